"""The geometry of InternVL against its own image processor, and against the definitions."""

import pickle

import numpy as np
import pytest
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from otprune import num_kept
from otprune.families import FAMILIES, Frame, Options
from otprune.families.internvl import StretchedTiles, best_tiles, num_crops
from otprune.models import CheckpointError, read_checkpoint
from tests.tiny import MAKERS

SIDE, TOKENS = 448, 256
# Ties between grids, small and large; shapes halfway between two grids; lines; and the photos of the README's table.
ODD = [(448, 448), (449, 448), (316, 317), (1000, 1000), (4000, 4000), (300, 600), (900, 1800), (200, 300), (2, 3)]
ODD += [(400, 500), (440, 550), (320, 7840)]  # halfway between 1 x 2 and 2 x 1, and between 1 x 24 and 1 x 25
ODD += [(100, 150), (1, 1), (1, 400), (400, 1), (600, 450), (768, 1024), (480, 640), (512, 512), (1080, 1920)]


def sizes(count: int = 200) -> list[tuple[int, int]]:
    """Pictures of 10 to 6000 pixels a side, in steps of equal ratio, some of simple ratios of sides, and odd ones."""
    numbers = np.random.default_rng(0)
    free = np.exp(numbers.uniform(np.log(10), np.log(6000), (count, 2))).astype(int).tolist()
    simple = [(h * step, w * step) for h, w, step in numbers.integers(1, (7, 7, 900), (count // 3, 3)).tolist()]
    usual = [(height, width) for height, width in free if max(height, width) <= SIDE * min(height, width)]
    return [*ODD, *simple, *usual][:count]


def geometry(most: int = 12, least: int = 1, retention: float = 1.0) -> StretchedTiles:
    """As of the released checkpoints."""
    return StretchedTiles(
        side=SIDE,
        grid_side=16,
        min_tiles=least,
        max_tiles=most,
        background=(123, 116, 103),
        retention=retention,
    )


@pytest.mark.parametrize(
    ("least", "most"), [(1, 12), (1, 6), (1, 1), (1, 2), (3, 12), (2, 40), (12, 12), (2, 2), (1, 25)]
)
def test_tiles_and_token_counts_are_those_of_the_image_processor(least, most):
    found = geometry(most, least)
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, min_patches=least, max_patches=most, crop_to_patches=True
    )
    assert len(sizes()) == 200
    for height, width in sizes():
        expected = processor.get_number_of_image_patches(height, width, {})
        rows, columns = found.tiles((height, width))
        assert (columns, rows) == get_optimal_tiled_canvas((height, width), (SIDE, SIDE), least, most)
        frame = found.frame((height, width))
        assert frame.num_crops == expected == num_crops(rows * columns), (height, width)
        assert (frame.height, frame.width) == (rows * SIDE, columns * SIDE)
        assert found.num_visual((height, width)) == found.num_visual((height, width), "tiles") == TOKENS * expected
        assert TOKENS * expected <= found.most_visual == TOKENS * num_crops(most)
        assert int(np.prod(frame.shape)) <= found.most_bytes


def test_photos_have_the_tokens_that_the_readme_says():
    found = geometry()
    photos = {(768, 1024): 3328, (480, 640): 3328, (512, 512): 256, (1080, 1920): 2304, (3000, 4000): 3328}
    assert {size: found.num_visual(size) for size in photos} == photos
    assert geometry(6).num_visual((768, 1024)) == 1792
    assert found.frame((512, 512)) == Frame(448, 448, "stretch")
    assert found.frame((768, 1024)) == Frame(1344, 1792, "stretch", tile=448, overview="last")


def test_of_grids_of_equal_shape_the_largest_below_twice_the_pictures_area_counts():
    squares = {side: best_tiles((side, side), 10, 1, 12) for side in (5, 14, 15, 21, 22, 30)}
    assert squares == {5: (1, 1), 14: (1, 1), 15: (2, 2), 21: (2, 2), 22: (3, 3), 30: (3, 3)}


def test_a_picture_thinner_than_a_pixel_of_a_tile_is_one_clear_line():
    with pytest.raises(ValueError, match="449 x 1 is thinner than one pixel at 448 x 448"):
        geometry().frame((1, 449))


def test_the_kept_tokens_of_a_span_stand_one_behind_the_other():
    span = geometry().span((768, 1024), np.array([3, 1000, 3327]), image_token=7)
    assert (span.tokens.tolist(), span.positions.tolist(), span.extent) == ([7, 7, 7], [[0, 1, 2]], 3)


# Smaller pictures


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("retention", [1.0, 0.75, 0.5, 0.2, 0.098, 0.01])
def test_a_smaller_picture_has_as_many_tiles_as_the_kept_tokens_allow_but_one_at_least(retention, least):
    """Against all limits of tiles, of which the largest within the budget counts."""
    whole = geometry(12, least)
    found = whole.shrunk(retention)
    for size in sizes():
        k = num_kept(retention, whole.num_visual(size))
        by_limit = [geometry(most, min(least, most)).num_visual(size) for most in range(1, 13)]
        assert by_limit == sorted(by_limit)
        expected = max([tokens for tokens in by_limit if tokens <= k], default=TOKENS)
        assert found.num_visual(size) == expected
        assert found.frame(size).num_crops * TOKENS == expected <= found.most_visual
    assert found.most_visual == max(map(found.num_visual, [*sizes(), (448, 448 * 12)]))


def test_retention_of_a_smaller_picture_is_checked():
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\], got 0"):
        geometry().shrunk(0)


# The record


def test_a_checkpoint_travels_with_its_geometry(tmp_path):
    found = read_checkpoint(str(MAKERS["internvl"](tmp_path)))
    assert pickle.loads(pickle.dumps(found)) == found
    assert (found.geometry.axes, found.geometry.fixed, found.geometry.tiled, found.levels) == (1, None, True, 0)
    assert (found.geometry.side, found.geometry.num_tokens, found.geometry.max_tiles) == (56, 16, 6)
    assert found.geometry.background == (123, 116, 103)
    assert found.options == Options(max_tiles=6)
    assert found.row_width == 64
    assert found.class_attention is False


def test_the_number_of_tiles_is_the_users(tmp_path):
    folder = str(MAKERS["internvl"](tmp_path))
    for tiles in (1, 3, 20):
        found = read_checkpoint(folder, Options(max_tiles=tiles))
        assert found.options.max_tiles == found.geometry.max_tiles == tiles
        assert found.geometry.most_visual == 16 * num_crops(tiles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(max_tiles=0), "max_tiles must be at least 1, the fewest tiles of a picture, got 0"),
        (Options(max_pixels=10**6), "max_pixels and model.min_pixels must be null: model.max_tiles limits"),
        (Options(min_pixels=10**6), "max_pixels and model.min_pixels must be null: model.max_tiles limits"),
        (Options(aspect="pad"), "decode.aspect must be auto, as pictures are stretched to their tiles, got pad"),
    ],
)
def test_options_that_fit_no_tiles_are_refused_in_one_line(tmp_path, options, message):
    folder = MAKERS["internvl"](tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder), options)
    assert "\n" not in str(caught.value)


QWEN3 = {"qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"}  # read as qwen3_vl is


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"internvl", "smolvlm", "idefics3"} - QWEN3))
def test_families_whose_tiles_cannot_be_chosen_refuse_a_number_of_them(tmp_path, name):
    folder = MAKERS[name](tmp_path)
    with pytest.raises(
        CheckpointError, match=r"model\.max_tiles must be null: .* for InternVL and SmolVLM alone"
    ) as caught:
        read_checkpoint(str(folder), Options(max_tiles=6))
    assert "\n" not in str(caught.value)
