"""Counts what is kept of the overview and of the tiles of pictures that have both.

A method that chooses among all tokens of a picture decides by itself how many come from the overview, which shows the
whole of it coarsely, and how many from the tiles, which show its parts in detail.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from otprune.families import Geometry, Size, overview_tokens

CROP_TOKENS = ("overview", "overview_kept", "tiles", "tiles_kept")
"""Keys of the counts: tokens of the overviews and of the tiles, before and after pruning."""


def count_crops(pictures: Iterable[tuple[Size, int, np.ndarray]], geometry: Geometry) -> dict[str, int]:
    """The counts over pictures, by CROP_TOKENS; {} if none of them has an overview and tiles.

    A picture with a token that belongs to no single place is not counted.

    Args:
        pictures: of each the size, the number of tokens before pruning, and the index of each kept token.
    """
    counts: Counter[str] = Counter()
    for size, num_visual, kept in pictures:
        overview = overview_tokens(geometry, size, num_visual)
        if overview is None or (kept < 0).any():
            continue
        of_overview = int(((kept >= overview.start) & (kept < overview.stop)).sum())
        of_tiles = len(kept) - of_overview
        numbers = (len(overview), of_overview, num_visual - len(overview), of_tiles)
        counts.update(dict(zip(CROP_TOKENS, numbers, strict=True)))
    return dict(counts)
