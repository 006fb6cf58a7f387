"""The geometry of LLaVA-1.5 and 1.6 by its definitions; the counts of 1.6 against transformers' own processor."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlavaNextProcessor

from otprune.families import FAMILIES, Frame, Geometry, collect
from otprune.families.llava import LLAVA, Square
from otprune.families.llava_next import LLAVA_NEXT, Tiled, best_resolution, unpadded

RELEASED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # image_grid_pinpoints of LLaVA-1.6
SQUARE = Square(side=336, num_tokens=576, background=(122, 116, 104))
TILED = Tiled(side=336, grid_side=24, resolutions=RELEASED, background=(122, 116, 104))
KEPT = np.array([0, 3, -1, 575])


def sizes(count: int = 200) -> list[tuple[int, int]]:
    """(height, width) of 10 to 6000 pixels a side, in steps of equal ratio, and some odd ones."""
    sides = np.exp(np.random.default_rng(0).uniform(np.log(10), np.log(6000), (count, 2))).astype(int).tolist()
    usual = [(height, width) for height, width in sides if max(height, width) <= 300 * min(height, width)]
    return [(1, 1), (1, 336), (336, 1), (336, 336), (672, 672), (2, 600), *usual]


@pytest.mark.parametrize("geometry", [SQUARE, TILED])
def test_a_geometry_travels_between_processes(geometry):
    assert pickle.loads(pickle.dumps(geometry)) == geometry


@pytest.mark.parametrize("geometry", [SQUARE, TILED])
def test_a_picture_may_be_as_thin_as_one_pixel_of_the_square_but_no_thinner(geometry):
    for size in ((1, 336), (336, 1), (10, 3360)):
        geometry.frame(size)
    for height, width in ((1, 337), (337, 1), (10, 3361)):
        with pytest.raises(ValueError, match=rf"{width} x {height} is thinner than one pixel at 336 x 336"):
            geometry.frame((height, width))


@pytest.mark.parametrize("geometry", [SQUARE, TILED])
def test_a_span_is_one_image_token_for_each_kept_one_on_one_axis(geometry: Geometry):
    span = geometry.span((480, 640), KEPT, 32000)
    assert (span.tokens.tolist(), span.positions.tolist()) == ([32000] * 4, [[0, 1, 2, 3]])
    assert len(span) == span.extent == 4
    assert geometry.axes == len(span.positions)
    assert len(geometry.span((480, 640), KEPT[:0], 32000)) == 0


@pytest.mark.parametrize("geometry", [SQUARE, TILED])
def test_a_smaller_picture_has_no_fewer_tokens_that_would_help(geometry):
    """Both scale every picture up to the tower's one size."""
    assert geometry.shrunk(0.1) is None


# LLaVA-1.5


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_every_picture_is_the_same_square(fit):
    geometry = replace(SQUARE, fit=fit)
    assert (geometry.fixed, geometry.most_visual, geometry.tiled) == (576, 576, False)
    for size in sizes():
        frame = geometry.frame(size)
        assert frame == Frame(336, 336, fit)
        assert (frame.shape, frame.num_crops) == ((336, 336, 3), 1)
        assert np.prod(frame.shape) == geometry.most_bytes
        assert geometry.num_visual(size) == geometry.num_visual(size, "tiles") == 576
        assert geometry.grid(size) == (24, 24)


def test_with_a_class_token_the_tokens_form_no_grid():
    assert replace(SQUARE, num_tokens=577).grid((336, 336)) == (0, 0)


# LLaVA-1.6


def test_the_number_of_tokens_is_that_of_transformers():
    processor = object.__new__(LlavaNextProcessor)  # counting needs no tokenizer
    for size in sizes():
        height, width = best_resolution(size, RELEASED)
        packed, newlines = processor._get_unpadded_features(*size, 24, 24, height // 336, width // 336)
        assert TILED.num_visual(size) == 576 + packed + newlines, size
    assert TILED.fixed is None


def test_the_largest_picture_has_the_published_number_of_tokens():
    assert max(map(TILED.num_visual, sizes())) == TILED.num_visual((1000, 1000)) == 2928


def test_a_frame_is_the_overview_and_the_tiles_of_a_known_resolution():
    for size in sizes():
        frame = TILED.frame(size)
        assert (frame.height, frame.width) in RELEASED, size
        assert (frame.rows * frame.tile, frame.columns * frame.tile) == (frame.height, frame.width)
        assert frame.num_crops == 1 + frame.rows * frame.columns
        assert frame.shape == (frame.num_crops, 336, 336, 3)
        assert np.prod(frame.shape) <= TILED.most_bytes == 5 * 3 * 336**2
        assert TILED.num_visual(size, "tiles") == 576 * frame.num_crops
        assert TILED.grid(size) == (24, 24), "of the overview, which comes first"


@pytest.mark.parametrize("grid", [(48, 48), (24, 48), (72, 24)])
def test_padding_lies_evenly_on_two_sides_and_the_rest_is_the_picture_scaled_to_fit(grid):
    for size in sizes():
        scale, covered = min(grid[0] / size[0], grid[1] / size[1]), unpadded(*grid, size)
        assert grid[0] == len(covered[0]) or grid[1] == len(covered[1]), size
        for length, cells, side in zip(grid, covered, size, strict=True):
            assert cells.start == length - cells.stop, size
            assert abs(len(cells) - side * scale) <= 1 + 1e-6, size  # to whole cells, and to equal margins


# The record


def test_each_model_type_has_one_record():
    assert FAMILIES["llava"] is LLAVA
    assert FAMILIES["llava_next"] is LLAVA_NEXT
    assert all(family.name == name for name, family in FAMILIES.items())
    with pytest.raises(ValueError, match="families must have different names, got llava, llava_next, llava"):
        collect(LLAVA, LLAVA_NEXT, LLAVA)
