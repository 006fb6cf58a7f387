"""The geometry of Mistral-Small-3 against its own image processor, and against the definitions."""

import pickle

import numpy as np
import pytest
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from otprune import num_kept
from otprune.families import FAMILIES, Options
from otprune.families.mistral3 import PatchRows, full_grid
from otprune.families.qwen_vl import grid_within
from otprune.models import CheckpointError, read_checkpoint
from tests.tiny import MAKERS

IMAGE, BREAK, END = 10, 12, 13
# Sides at the longest one and beside it, lines, and the photos of the README's table.
ODD = [(1540, 1540), (1541, 1540), (1540, 1541), (1539, 1), (1, 1540), (28, 28), (29, 28), (1, 1), (3, 2), (56, 57)]
ODD += [(768, 1024), (480, 640), (512, 512), (1080, 1920), (3000, 4000), (4000, 3000), (4000, 4000), (3080, 2)]


def sizes(count: int = 200, longest: int = 1540) -> list[tuple[int, int]]:
    """Pictures of 10 to 6000 pixels a side, in steps of equal ratio, and odd ones; none too thin."""
    sides = np.exp(np.random.default_rng(0).uniform(np.log(10), np.log(6000), (2 * count, 2))).astype(int).tolist()
    odd = [size for size in ODD if min(size) * longest >= max(size)]
    return [*odd, *((height, width) for height, width in sides)][:count]


def geometry(most: int | None = 1280, token: int = 28, longest: int = 1540, retention: float = 1.0) -> PatchRows:
    """As of the released checkpoints; `most` tokens, None: as many as the longest side allows."""
    return PatchRows(
        token=token,
        longest=longest,
        max_pixels=(most or 10**6) * token**2,
        row_break=BREAK,
        end=END,
        background=(122, 116, 104),
        retention=retention,
    )


@pytest.mark.parametrize(("longest", "token"), [(1540, 28), (1024, 32), (1000, 28), (333, 14)])
def test_token_counts_are_those_of_the_image_processor(longest, token):
    found = geometry(None, token, longest)
    assert len(set(sizes(longest=longest))) >= 195
    for size in sizes(longest=longest):
        pixels = np.broadcast_to(np.uint8(0), (*size, 3))
        height, width = get_resize_output_image_size(pixels, (longest,) * 2, (token,) * 2, "channels_last")
        frame = found.frame(size)
        assert (frame.height, frame.width, frame.fit) == (height, width, "stretch"), size
        assert found.grid(size) == (height // token, width // token)
        assert found.num_visual(size) == height * width // token**2 <= found.most_visual
        assert 3 * height * width <= found.most_bytes
    assert found.most_visual == found.num_visual((longest, longest))


def test_photos_have_the_tokens_that_the_readme_says():
    photos = {(768, 1024): 1036, (480, 640): 414, (512, 512): 361, (3000, 4000): 2310, (4000, 4000): 3025}
    assert {size: geometry(None).num_visual(size) for size in photos} == photos
    small, large = [size for size, count in photos.items() if count <= 1280], [(3000, 4000), (4000, 4000), (1080, 1920)]
    assert {size: geometry().num_visual(size) for size in small} == {size: photos[size] for size in small}
    for size in large:
        assert 1230 < geometry().num_visual(size) <= geometry().most_visual == 1280


@pytest.mark.parametrize("most", [1280, 300, 64, 2, 1])
def test_a_picture_above_the_limit_has_about_its_shape_and_at_most_as_many_tokens(most):
    found, whole = geometry(most), geometry(None)
    for size in sizes():
        rows, columns = whole.grid(size)
        fewer_rows, fewer_columns = found.grid(size)
        assert fewer_rows * fewer_columns <= most == found.most_visual
        if rows * columns <= most:
            assert (fewer_rows, fewer_columns) == (rows, columns)
            continue
        ideal_rows, ideal_columns = (most * rows / columns) ** 0.5, (most * columns / rows) ** 0.5
        if min(ideal_rows, ideal_columns) >= 1:
            assert abs(fewer_rows - ideal_rows) < 1
            assert abs(fewer_columns - ideal_columns) < 1
        else:
            assert (fewer_rows, fewer_columns) in {(1, most), (most, 1)}


@pytest.mark.parametrize("size", [(1541, 1), (1, 1541), (10, 16000), (6000, 3)])
def test_a_picture_of_which_nothing_is_left_is_one_clear_line(size):
    with pytest.raises(ValueError, match=rf"{size[1]} x {size[0]} is thinner than one pixel at 1540 pixels"):
        geometry().frame(size)
    pixels = np.broadcast_to(np.uint8(0), (*size, 3))
    assert 0 in get_resize_output_image_size(pixels, (1540, 1540), (28, 28), "channels_last")  # as the processor


@pytest.mark.parametrize("retention", [1.0, 0.75, 0.33, 0.1, 0.01])
def test_a_smaller_picture_has_at_most_the_tokens_that_retention_keeps_and_about_its_shape(retention):
    whole, found = geometry(), geometry().shrunk(retention)
    assert found == geometry(retention=retention)
    for size in sizes():
        rows, columns = whole.grid(size)
        k, (fewer_rows, fewer_columns) = num_kept(retention, rows * columns), found.grid(size)
        assert (fewer_rows, fewer_columns) == grid_within(rows, columns, k)
        assert found.num_visual(size) == fewer_rows * fewer_columns <= min(k, found.most_visual)
        frame = found.frame(size)
        assert (frame.height, frame.width) == (fewer_rows * 28, fewer_columns * 28)
        assert len(found.span(size, np.arange(fewer_rows * fewer_columns), IMAGE)) == fewer_rows * (fewer_columns + 1)
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\], got 0"):
        geometry().shrunk(0)


def test_a_grid_that_fits_stays():
    assert full_grid((60, 40), 14, 150) == grid_within(5, 3, 15) == grid_within(5, 3, 10**6) == (5, 3)


# Spans: a picture of 4 rows of 3 tokens


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (range(12), [*[IMAGE] * 3, BREAK] * 3 + [*[IMAGE] * 3, END]),  # as the processor writes it
        ([0, 2, 4, 9], [IMAGE, IMAGE, BREAK, IMAGE, BREAK, IMAGE, END]),  # row 2 loses its break
        ([2, 3], [IMAGE, BREAK, IMAGE, END]),  # neighbours in raster order are not in one row
        ([3, 4, 5], [IMAGE, IMAGE, IMAGE, END]),  # one row is left: the picture's end is its end
        ([11], [IMAGE, END]),
    ],
)
def test_each_row_that_keeps_a_token_ends_with_a_break_and_the_last_of_them_with_the_pictures_end(kept, expected):
    found = geometry()
    assert found.grid((112, 84)) == (4, 3)
    span = found.span((112, 84), np.array(kept), IMAGE)
    assert span.tokens.tolist() == expected
    assert span.tokens.dtype == np.int64
    assert span.positions.tolist() == [list(range(len(expected)))]
    assert span.extent == len(expected)


def test_kept_tokens_need_one_id_more_for_each_row_left():
    found, numbers = geometry(), np.random.default_rng(0)
    for size in sizes(60):
        rows, columns = found.grid(size)
        kept = np.sort(numbers.choice(rows * columns, num_kept(0.1, rows * columns), replace=False))
        tokens = found.span(size, kept, IMAGE).tokens
        left = len({int(index) // columns for index in kept})
        assert (tokens == IMAGE).sum() == len(kept)
        assert (tokens == BREAK).sum() == left - 1
        assert (tokens == END).sum() == 1 == (tokens[-1] == END)


def test_a_token_of_no_single_place_is_in_no_row():
    with pytest.raises(ValueError, match="every kept token must have a place"):
        geometry().span((112, 84), np.array([3, -1]), IMAGE)


# The record


def test_a_checkpoint_travels_with_its_geometry(tmp_path):
    found = read_checkpoint(str(MAKERS["mistral3"](tmp_path)), Options(max_pixels=50 * 196))
    assert pickle.loads(pickle.dumps(found)) == found
    assert (found.geometry.axes, found.geometry.fixed, found.geometry.tiled, found.family) == (
        1,
        None,
        False,
        "mistral3",
    )
    assert (found.geometry.max_pixels, found.geometry.longest, found.geometry.token) == (50 * 196, 150, 14)
    assert found.options == Options(max_pixels=50 * 196)
    assert read_checkpoint(str(tmp_path), found.options).geometry == found.geometry
    assert read_checkpoint(str(tmp_path)).options == Options(max_pixels=1280 * 196)
    assert (found.levels, found.row_width, found.class_attention) == (0, 64, False)
    assert found.record is FAMILIES["mistral3"]
    assert found.record.image_text("[IMG]") == "[IMG]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(max_pixels=195), "model.max_pixels must be at least 196, the 14 x 14 of one token, got 195"),
        (Options(min_pixels=1000), "model.min_pixels must be null, as pictures are never enlarged, got 1000"),
        (Options(aspect="pad"), "decode.aspect must be auto, as pictures keep their shape, got pad"),
        (Options(max_tiles=2), "model.max_tiles must be null"),
    ],
)
def test_options_that_fit_no_picture_are_refused_in_one_line(tmp_path, options, message):
    folder = MAKERS["mistral3"](tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder), options)
    assert "\n" not in str(caught.value)
