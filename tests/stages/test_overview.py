"""What is kept of overviews and of tiles, against a count by hand."""

import numpy as np

from otprune.families.internvl import StretchedTiles
from otprune.families.llava import Square
from otprune.families.llava_next import Tiled
from pipelines.stages.overview import count_crops

LAST = StretchedTiles(side=56, grid_side=4, min_tiles=1, max_tiles=4, background=(0, 0, 0))
FIRST = Tiled(side=56, grid_side=4, resolutions=((56, 112), (112, 112)), background=(0, 0, 0))
SIZE, ALONE = (112, 112), (56, 56)  # four tiles, and one


def test_an_overview_stands_last_or_first():
    """Tokens 64 to 79 behind four tiles; 0 to 15 in front of them."""
    kept = np.array([0, 15, 16, 63, 64, 79])
    assert count_crops([(SIZE, 80, kept)], LAST) == {"overview": 16, "overview_kept": 2, "tiles": 64, "tiles_kept": 4}
    num_visual = FIRST.num_visual(SIZE)
    assert count_crops([(SIZE, num_visual, kept)], FIRST) == {
        **{"overview": 16, "overview_kept": 2},
        **{"tiles": num_visual - 16, "tiles_kept": 4},
    }


def test_pictures_add_up_and_those_without_an_overview_count_nothing():
    one = (SIZE, 80, np.array([70, 71, 3]))
    assert count_crops([one, (ALONE, 16, np.arange(16)), one], LAST) == {
        **{"overview": 32, "overview_kept": 4},
        **{"tiles": 128, "tiles_kept": 2},
    }
    assert count_crops([(ALONE, 16, np.arange(16))], LAST) == {}
    square = Square(side=56, num_tokens=16, background=(0, 0, 0))
    assert count_crops([(ALONE, 16, np.arange(16))], square) == {}


def test_tokens_of_no_single_place_are_not_counted():
    assert count_crops([(SIZE, 80, np.array([-1, 70]))], LAST) == {}


def test_an_overview_that_keeps_nothing_is_counted():
    assert count_crops([(SIZE, 80, np.array([0]))], LAST)["overview_kept"] == 0
