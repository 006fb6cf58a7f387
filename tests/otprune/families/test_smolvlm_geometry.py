"""The geometry of SmolVLM2 and Idefics3 against their own processor, and against the definitions."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from otprune import num_kept
from otprune.families import Frame, Options
from otprune.families.internvl import num_crops
from otprune.families.smolvlm import LabelledTiles, layout, scaled, tiles, with_texts
from otprune.models import CheckpointError, read_checkpoint
from tests.tiny import MAKERS, SMOLVLM_TEMPLATE, SMOLVLM_TOKENS, save_tokenizer

# side, longest edge, rows of a tile's tokens: as published for Idefics3-8B, SmolVLM2-2.2B and SmolVLM2-500M.
RELEASED = [(364, 1456, 13), (384, 1536, 9), (512, 2048, 8)]
ODD = [(384, 384), (385, 384), (1536, 1536), (1, 1), (1, 364), (364, 1), (100, 150), (600, 450), (768, 1024)]
ODD += [(480, 640), (512, 512), (1080, 1920), (3000, 4000), (300, 600), (1152, 1536), (1153, 1536), (3, 4)]


def sizes(count: int = 200) -> list[tuple[int, int]]:
    """Pictures of 10 to 6000 pixels a side, in steps of equal ratio, some of simple ratios of sides, and odd ones."""
    numbers = np.random.default_rng(0)
    free = np.exp(numbers.uniform(np.log(10), np.log(6000), (count, 2))).astype(int).tolist()
    simple = [(h * step, w * step) for h, w, step in numbers.integers(1, (7, 7, 900), (count // 3, 3)).tolist()]
    usual = [(height, width) for height, width in free if max(height, width) <= 364 * min(height, width)]
    return [*ODD, *simple, *usual][:count]


def geometry(side=384, edge=1536, grid=9, most=16, retention=1.0) -> LabelledTiles:
    return LabelledTiles(
        side=side, grid_side=grid, edge=edge, max_tiles=most, background=(127, 127, 127), retention=retention
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, SMOLVLM_TOKENS, SMOLVLM_TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


def with_labels(plain: LabelledTiles, tokenizer) -> LabelledTiles:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return with_texts(plain, "<image>", image, lambda text: tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(("side", "edge", "grid"), RELEASED)
@pytest.mark.parametrize("rows", [4, 3, 2, 1])
def test_token_counts_are_those_of_the_processor(side, edge, grid, rows, tokenizer):
    """Of tokens, of crops, and of a whole span with its labels. A shorter edge is what the processor is given too."""
    edge = edge * rows // 4
    found = with_labels(geometry(side, edge, grid, rows**2), tokenizer)
    images = Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size={"longest_edge": side})
    processor = Idefics3Processor(images, tokenizer, grid**2)
    assert len(sizes()) == 200
    lengths = processor._get_num_multimodal_tokens(sizes())["num_image_tokens"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    for (height, width), length in zip(sizes(), lengths, strict=True):
        crops, of_rows, of_columns = images.get_number_of_image_patches(height, width, {})
        assert found.tiles((height, width)) == (max(1, of_rows), max(1, of_columns)), (height, width)
        frame = found.frame((height, width))
        assert frame.num_crops == max(1, crops)
        num_visual = found.num_visual((height, width))
        assert num_visual == found.num_visual((height, width), "tiles") == grid**2 * frame.num_crops
        assert num_visual <= found.most_visual
        assert int(np.prod(frame.shape)) <= found.most_bytes
        span = found.span((height, width), np.arange(num_visual), image)
        assert (span.tokens == image).sum() == num_visual
        assert len(span) == span.extent == length
    assert max(map(found.num_visual, sizes())) == found.most_visual


@pytest.mark.parametrize(("side", "edge"), [(28, 112), (28, 100), (28, 30)])
def test_sizes_are_those_of_the_pictures_that_the_processor_cuts(side, edge):
    """Also where the longest edge is no multiple of a tile's side, where the processor's own count differs."""
    processor: Any = Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size={"longest_edge": side})
    for height, width in sizes():
        if max(height, width) > side * min(height, width) or max(height, width) > 2000:
            continue
        picture = torch.zeros(3, height, width, dtype=torch.uint8).numpy()
        cut = processor([[picture]], return_row_col_info=True)
        rows, columns = cut["rows"][0][0], cut["cols"][0][0]
        assert tiles((height, width), edge, side) == (max(1, rows), max(1, columns)), (height, width)


def test_photos_have_the_tokens_that_the_readme_says():
    found = geometry()
    photos = {(768, 1024): 1053, (480, 640): 1053, (512, 512): 1377, (1080, 1920): 1053, (3000, 4000): 1053}
    assert {size: found.num_visual(size) for size in photos} == photos
    assert geometry(most=9).num_visual((768, 1024)) == 810
    assert geometry(most=6).num_visual((768, 1024)) == 405
    assert found.frame((512, 512)) == Frame(
        1536, 1536, "stretch", "lanczos", tile=384, overview="last", via=(1536, 1536)
    )
    assert found.frame((480, 640)).via == scaled((480, 640), 1536) == (1152, 1536)
    assert geometry(most=1).frame((480, 640)) == Frame(384, 384, "stretch", "lanczos", via=(288, 384))


@pytest.mark.parametrize("most", range(1, 17))
def test_a_limit_of_tiles_takes_the_longest_edge_that_keeps_it(most):
    found = geometry(most=most)
    for size in sizes():
        counts = [rows * columns for rows, columns in (tiles(size, 384 * n, 384) for n in (1, 2, 3, 4))]
        assert counts == sorted(counts)
        expected = max(count for count in counts if count <= most)
        assert found.num_visual(size) == 81 * num_crops(expected) <= found.most_visual


def test_a_picture_thinner_than_a_pixel_of_a_tile_is_one_clear_line():
    with pytest.raises(ValueError, match=r"385 x 1 is thinner than one pixel at 384 x 384"):
        geometry().frame((1, 385))


# Spans


def test_kept_tokens_stand_behind_the_labels_of_their_tiles_and_all_labels_stay(tokenizer):
    """Of 3 x 4 tiles of 81 tokens, one keeps two tokens, the overview one, and all others none."""
    found, image = with_labels(geometry(), tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    kept = np.array([81 * 5 + 3, 81 * 5 + 80, 81 * 12])
    span = found.span((768, 1024), kept, image)
    mark, line = "<fake_token_around_image>", "\n"
    rows = ["".join(f"{mark}<row_{r}_col_{c}>" for c in range(1, 5)) + line for r in (1, 2, 3)]
    rows[1] = rows[1].replace("<row_2_col_2>", "<row_2_col_2><image><image>")
    written = "".join(rows) + f"{line}{mark}<global-img><image>{mark}"
    assert span.tokens.tolist() == tokenizer(written).input_ids
    assert span.positions.tolist() == [list(range(len(span)))]
    assert len(span) == span.extent == 3 + 12 * 2 + 4 + 2 + 1
    assert len(found.span((768, 1024), np.arange(0), image)) == len(span) - 3


def test_line_breaks_that_a_tokenizer_joins_are_joined():
    """As Llama 3's tokenizer joins them, in front of the overview."""

    def encode(text: str) -> list[int]:
        ids = []
        for piece in text.replace("<image>", " <image> ").replace("\n\n", " JOINED ").replace("\n", " LINE ").split():
            ids += {"<image>": [1], "JOINED": [2], "LINE": [3]}.get(piece, [9])
        return ids

    found = with_texts(geometry(), "<image>", 1, encode)
    assert found.texts[1][0] == ((9,), (3, 9), (2, 9), (9,))
    assert layout(2, 1, "I") == (
        "<fake_token_around_image><row_1_col_1>I\n<fake_token_around_image><row_2_col_1>I\n\n"
        "<fake_token_around_image><global-img>I<fake_token_around_image>"
    )


def test_a_tokenizer_without_the_image_token_is_refused():
    with pytest.raises(ValueError, match="must find the image token 1 1 times in 1 crops, found 0"):
        with_texts(geometry(), "<image>", 1, lambda text: [5, 6])


@pytest.mark.parametrize("kept", [[-1, 3], [0, 1053]])
def test_a_token_without_a_tile_has_no_place(tokenizer, kept):
    with pytest.raises(ValueError, match=r"kept tokens must be 0 to 1052, .*, got"):
        with_labels(geometry(), tokenizer).span((768, 1024), np.array(kept), 5)


def test_a_geometry_without_labels_makes_no_span():
    with pytest.raises(ValueError, match="must hold the text between"):
        geometry().span((768, 1024), np.arange(3), 5)


# Smaller pictures


@pytest.mark.parametrize("retention", [1.0, 0.75, 0.5, 0.33, 0.098, 0.01])
@pytest.mark.parametrize("most", [16, 9])
def test_a_smaller_picture_has_as_many_tiles_as_the_kept_tokens_allow_but_one_at_least(retention, most):
    whole = geometry(most=most)
    found = whole.shrunk(retention)
    for size in sizes():
        k = num_kept(retention, whole.num_visual(size))
        by_edge = [81 * num_crops(rows * columns) for rows, columns in (tiles(size, 384 * n, 384) for n in range(1, 5))]
        allowed = [tokens for tokens in by_edge if tokens <= min(k, whole.num_visual(size))]
        assert found.num_visual(size) == max(allowed, default=81) <= found.most_visual
        assert found.frame(size).num_crops * 81 == found.num_visual(size)


def test_retention_of_a_smaller_picture_is_checked():
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\], got 0"):
        geometry().shrunk(0)


# The record


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_a_checkpoint_travels_with_its_geometry(tmp_path, name):
    found: Any = read_checkpoint(str(MAKERS[name](tmp_path)))
    copy = pickle.loads(pickle.dumps(found))
    assert (copy, hash(copy)) == (found, hash(found))
    assert (found.geometry.axes, found.geometry.fixed, found.geometry.tiled, found.levels) == (1, None, True, 0)
    assert (found.geometry.side, found.geometry.edge, found.geometry.num_tokens) == (58, 174, 16)
    assert found.geometry.background == (127, 127, 127)
    assert found.options == Options(max_tiles=9)
    assert found.row_width == 64
    assert found.class_attention is False
    fewer: Any = read_checkpoint(str(tmp_path), Options(max_tiles=4))
    assert (fewer.geometry.most_visual, fewer.options.max_tiles) == (80, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(max_tiles=0), "max_tiles must be 1 to 9, .* longest edge of 174 pixels, got 0"),
        (Options(max_tiles=10), "max_tiles must be 1 to 9, .* longest edge of 174 pixels, got 10"),
        (Options(max_pixels=10**6), "max_pixels and model.min_pixels must be null: model.max_tiles limits"),
        (Options(aspect="pad"), "decode.aspect must be auto, as pictures are stretched to their tiles, got pad"),
    ],
)
def test_options_that_fit_no_tiles_are_refused_in_one_line(tmp_path, options, message):
    folder = MAKERS["smolvlm"](tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder), options)
    assert "\n" not in str(caught.value)
