"""What the report shows of an image: a small picture in its proportions, and the kept tokens on their grid."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from otprune.families.internvl import StretchedTiles
from otprune.families.llava import Square
from otprune.families.llava_next import Tiled
from pipelines.stages.thumbnail import THUMBNAIL, make_sample
from pipelines.stages.unit_batch import Sample

SQUARE = Square(side=56, num_tokens=16, background=(0, 0, 0))
TILED = Tiled(side=56, grid_side=4, resolutions=((56, 112), (112, 112)), background=(0, 0, 0))


def shown(sample: Sample) -> np.ndarray:
    """The pixels of a thumbnail, which must be as large as the sample says."""
    image = Image.open(io.BytesIO(base64.b64decode(sample.jpeg)))
    assert image.size == (sample.width, sample.height)
    return np.asarray(image)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((56, 56), (224, 224)), ((448, 448), (224, 224)), ((300, 600), (112, 224)), ((600, 300), (224, 112))],
)
def test_the_longer_side_of_a_thumbnail_is_fixed(shape, expected):
    sample = make_sample(np.zeros((*shape, 3), np.uint8), shape, [0], SQUARE)
    assert shown(sample).shape == (*expected, 3)
    assert max(expected) == THUMBNAIL


def test_a_line_still_has_a_pixel_across():
    assert shown(make_sample(np.zeros((2, 2000, 3), np.uint8), (2, 2000), [0], SQUARE)).shape == (1, 224, 3)


def test_of_a_picture_in_crops_the_overview_is_shown_with_its_own_tokens():
    """Token 16 is the first of the tiles."""
    crops = np.zeros((5, 56, 56, 3), np.uint8)
    crops[0] = 200
    sample = make_sample(crops, (80, 80), [-1, 0, 15, 16, 40], TILED)
    assert abs(int(shown(sample).mean()) - 200) <= 1
    assert (sample.kept, sample.rows, sample.columns) == ([-1, 0, 15], 4, 4)


def test_an_overview_behind_the_tiles_is_shown_with_the_tokens_at_the_end():
    """Token 64 is the first of the overview behind four tiles."""
    geometry = StretchedTiles(side=56, grid_side=4, min_tiles=1, max_tiles=4, background=(0, 0, 0))
    crops = np.zeros((5, 56, 56, 3), np.uint8)
    crops[-1] = 200
    sample = make_sample(crops, (112, 112), [-1, 0, 15, 63, 64, 66, 79], geometry)
    assert abs(int(shown(sample).mean()) - 200) <= 1
    assert (sample.kept, sample.rows, sample.columns) == ([-1, 0, 2, 15], 4, 4)
    alone = make_sample(np.zeros((56, 56, 3), np.uint8), (56, 56), [0, 2, 15], geometry)  # one tile, no overview
    assert (alone.kept, alone.rows, alone.columns) == ([0, 2, 15], 4, 4)


def test_tokens_that_form_no_grid_are_said_to_form_none():
    with_class_token = Square(side=56, num_tokens=17, background=(0, 0, 0))
    sample = make_sample(np.zeros((56, 56, 3), np.uint8), (56, 56), [0, 16], with_class_token)
    assert (sample.rows, sample.columns) == (0, 0)
