"""The geometry of Qwen2.5-VL and Qwen3-VL against their own image processor, and against the definitions."""

import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from otprune import num_kept
from otprune.families import ImageProcessor, Options
from otprune.families.qwen_vl import Patches, pixel_limits, smaller_grid
from otprune.models import CheckpointError, read_checkpoint
from tests.tiny import MAKERS

# As the released checkpoints store them: Qwen2.5-VL-7B-Instruct and Qwen3-VL-8B-Instruct.
PUBLISHED = {
    28: {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056},
    32: {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
}
THIN = [(10, 2000), (15, 3000), (3000, 15), (200, 1), (1, 200), (1, 1), (10, 10), (28, 28), (32, 32), (6000, 4000)]


def sizes(count: int = 200) -> list[tuple[int, int]]:
    """Pictures of 10 to 6000 pixels a side, in steps of equal ratio, none thinner than 1 : 200, and some odd ones."""
    sides = np.exp(np.random.default_rng(0).uniform(np.log(10), np.log(6000), (4 * count, 2))).astype(int).tolist()
    usual = [(height, width) for height, width in sides if max(height, width) <= 200 * min(height, width)]
    return [*THIN, *usual][:count]


def geometry(token: int, options: Options | None = None, retention: float = 1.0) -> Patches:
    least, most = pixel_limits(PUBLISHED[token], options or Options(), token)
    return Patches(token=token, min_pixels=least, max_pixels=most, background=(1, 2, 3), retention=retention)


@pytest.mark.parametrize("token", [28, 32])
@pytest.mark.parametrize("most_tokens", [None, 16384, 300, 64])
@pytest.mark.parametrize("least_tokens", [None, 1, 50])
def test_token_counts_are_those_of_the_image_processor(token, most_tokens, least_tokens):
    pixels = {"min_pixels": least_tokens, "max_pixels": most_tokens}
    limits = {name: tokens and tokens * token**2 for name, tokens in pixels.items()}
    found, processor = geometry(token, Options(**limits)), Qwen2VLImageProcessorPil(**PUBLISHED[token])
    limits = {"min_pixels": found.min_pixels, "max_pixels": found.max_pixels}
    assert found.max_pixels == (most_tokens or 1280) * token**2
    assert found.min_pixels == (least_tokens * token**2 if least_tokens else {28: 3136, 32: 65536}[token])
    assert len(sizes()) == 200
    for height, width in sizes():
        expected = processor.get_number_of_image_patches(height, width, limits) // 4
        assert found.num_visual((height, width)) == expected, (height, width)
        frame = found.frame((height, width))
        assert frame.height * frame.width == expected * token**2
        assert expected <= found.most_visual
        assert frame.fit == "stretch"


@pytest.mark.parametrize("token", [28, 32])
def test_a_photo_has_the_1280_tokens_of_the_default_at_most(token):
    found = geometry(token)
    assert found.most_visual == 1280
    assert 1200 < found.num_visual((3000, 4000)) <= 1280
    assert found.num_visual((768, 1024)) == {28: 27 * 37, 32: 24 * 32}[token]


def test_the_checkpoints_own_maximum_counts_if_it_is_smaller():
    stored = {"min_pixels": 784, "max_pixels": 100 * 784}
    assert pixel_limits(stored, Options(), 28) == (784, 78400)
    assert pixel_limits(stored, Options(max_pixels=200 * 784), 28) == (784, 200 * 784)  # unless the user says otherwise
    assert pixel_limits({}, Options(), 28) == (3136, 1280 * 784)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(max_pixels=3000), "model.max_pixels must be at least model.min_pixels, 3136 here, got 3000"),
        (Options(max_pixels=0, min_pixels=784), "model.max_pixels must be at least model.min_pixels, 784 here, got 0"),
        (Options(min_pixels=783), "min_pixels must be at least 784, the 28 x 28 of one token, got 783"),
        (Options(min_pixels=10**7, max_pixels=10**6), "model.max_pixels must be at least model.min_pixels"),
        (Options(min_pixels=2 * 10**6), "model.max_pixels must be at least model.min_pixels"),
        (Options(aspect="pad"), "decode.aspect must be auto, as pictures keep their shape, got pad"),
    ],
)
def test_options_that_fit_no_picture_are_refused_in_one_line(tmp_path, options, message):
    folder = MAKERS["qwen2_5_vl"](tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder), options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(10, 2001), (2001, 10), (1, 201)])
def test_a_picture_thinner_than_the_model_takes_is_one_clear_line(size):
    with pytest.raises(ValueError, match=rf"{size[1]} x {size[0]} is thinner than 1 : 200"):
        geometry(28).frame(size)
    with pytest.raises(ValueError, match="absolute aspect ratio"):  # as the image processor
        Qwen2VLImageProcessorPil().get_number_of_image_patches(*size)


# Spans


def test_a_kept_token_keeps_its_row_and_column_and_the_text_its_place():
    found = geometry(28)
    assert found.grid((140, 280)) == (5, 10)
    span = found.span((140, 280), np.array([0, 9, 10, 49]), image_token=7)
    assert span.tokens.tolist() == [7, 7, 7, 7]
    assert span.positions.tolist() == [[0, 0, 0, 0], [0, 0, 1, 4], [0, 9, 0, 9]]
    assert span.extent == 10
    assert found.span((280, 140), np.array([49]), 7).extent == 10
    assert found.span((280, 140), np.array([49]), 7).positions.tolist() == [[0], [9], [4]]


def test_a_token_of_no_single_place_has_no_position():
    with pytest.raises(ValueError, match="every kept token must have a place"):
        geometry(28).span((140, 280), np.array([3, -1]), image_token=7)


# Smaller pictures


@pytest.mark.parametrize("token", [28, 32])
@pytest.mark.parametrize("retention", [1.0, 0.75, 0.5, 0.25, 0.098, 0.01])
def test_a_smaller_picture_has_at_most_the_tokens_that_retention_keeps_and_about_its_shape(token, retention):
    whole = geometry(token)
    found = whole.shrunk(retention)
    for size in sizes():
        rows, columns = whole.grid(size)
        k, (fewer_rows, fewer_columns) = num_kept(retention, rows * columns), found.grid(size)
        assert found.num_visual(size) == fewer_rows * fewer_columns <= k
        assert 1 <= fewer_rows <= rows
        assert 1 <= fewer_columns <= columns
        assert found.most_visual >= found.num_visual(size)
        frame = found.frame(size)
        assert (frame.height, frame.width) == (fewer_rows * token, fewer_columns * token)
        assert found.span(size, np.array([0]), 7).extent == max(fewer_rows, fewer_columns)
        # The ideal sides have the shape of the whole picture and k tokens. If one is below 1, so few tokens allow none.
        ideal_rows, ideal_columns = (k * rows / columns) ** 0.5, (k * columns / rows) ** 0.5
        if min(ideal_rows, ideal_columns) >= 1:
            assert abs(fewer_rows - ideal_rows) < 1
            assert abs(fewer_columns - ideal_columns) < 1
        else:
            assert (fewer_rows, fewer_columns) in {(1, k), (k, 1)}


def test_a_smaller_picture_wastes_few_of_the_tokens_that_it_may_have():
    whole = geometry(28)
    large = [size for size in sizes() if whole.num_visual(size) >= 200 and max(size) <= 4 * min(size)]
    used = [whole.shrunk(0.25).num_visual(size) / num_kept(0.25, whole.num_visual(size)) for size in large]
    assert len(large) >= 30
    assert min(used) > 0.9
    assert np.mean(used) > 0.97


def test_no_grid_of_nearly_the_ideal_sides_has_more_tokens():
    """Against all grids of all sides, of which only those within one token of the ideal sides count."""
    for rows, columns, retention in itertools.product(range(3, 20, 4), range(3, 20, 2), (0.33, 0.5, 0.9, 1.0)):
        k = num_kept(retention, rows * columns)
        ideal_rows, ideal_columns = (k * rows / columns) ** 0.5, (k * columns / rows) ** 0.5
        near = [
            r * c
            for r in range(1, rows + 1)
            for c in range(1, columns + 1)
            if abs(r - ideal_rows) < 1 and abs(c - ideal_columns) < 1 and r * c <= k
        ]
        found = smaller_grid(rows, columns, retention)
        assert found[0] * found[1] == max(near), (rows, columns, retention, found)
        if retention == 1:
            assert found == (rows, columns)


def test_retention_of_a_smaller_picture_is_checked():
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\], got 0"):
        geometry(28).shrunk(0)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_tower_of_one_size_takes_no_smaller_pictures(name, tmp_path):
    assert read_checkpoint(str(MAKERS[name](tmp_path))).geometry.shrunk(0.5) is None


# The record


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_a_checkpoint_travels_with_its_geometry(name, tmp_path):
    found = read_checkpoint(str(MAKERS[name](tmp_path)), Options(max_pixels=50 * 1024))
    assert pickle.loads(pickle.dumps(found)) == found
    assert (found.geometry.axes, found.geometry.fixed, found.family) == (3, None, name)
    assert found.geometry.max_pixels == 50 * 1024
    assert found.levels == (2 if name.startswith("qwen3_vl") else 0)
    assert found.row_width == 64 * (1 + found.levels)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert found.geometry.background == ImageProcessor(mean=found.mean, std=found.std, settings=settings).color
    assert found.record.image_text("<|image_pad|>") == "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_checkpoint_without_image_processor_is_refused(name, tmp_path):
    folder = MAKERS[name](tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"must have a preprocessor_config\.json"):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("tokens", [1, 1.99, 2.5, 120.7])
def test_the_most_tokens_hold_for_limits_that_are_not_whole_tokens(tokens):
    found = Patches(token=28, min_pixels=784, max_pixels=int(tokens * 784), background=(1, 2, 3))
    counts = [found.num_visual(size) for size in [*sizes(), (28, 5600), (56000, 280)]]
    assert max(counts) <= found.most_visual
    assert found.frame((28, 5600)).height * found.frame((28, 5600)).width * 3 <= found.most_bytes


def test_families_load_neither_torch_nor_transformers():
    program = "import sys, otprune.families; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "set()"
