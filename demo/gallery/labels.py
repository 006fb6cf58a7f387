"""Labels for every cell and patch: dense supervision for the vision tower, computed from the opacities of a drawing.

Cells, in raster order, are what one visual token sees: 2 x 2 patches.
"""

import numpy as np

from demo.gallery.language import place_of
from demo.gallery.world import CELL, PATCH, RADII, SIGNS, Scene, Thing
from demo.language import COLUMNS, ROWS
from demo.world import COLORS, KINDS, Shape

COLOR, KIND, SIZE, ROW, COLUMN = range(5)  # label columns
NUM_LABELS = 5
KIND_WORDS = [*KINDS, *SIGNS, "nothing"]
NOTHING = len(KIND_WORDS) - 1
IGNORE = -1
MASK_SIDE = 7  # opacities are predicted in 2 x 2 pixels, 7 x 7 of them a patch

_FULL = 0.10  # from this mean opacity of a thing on, a cell counts as part of the thing
_TOUCHED = 0.01  # above this opacity and below _FULL, a cell is neither thing nor background


def cell_labels(scene: Scene, alpha: np.ndarray) -> np.ndarray:
    """int8 [N, 5]: colour, kind or word, size, row and column of the place; -1 where undefined.

    A background cell has its own place as label, a cell of a thing has the place of the thing. Cells that a thing only
    touches are ignored: all their labels are -1.

    alpha: float32 [things, H, W], see `demo.gallery.render.Drawing`.
    """
    rows, columns = scene.rows, scene.columns
    labels = np.full((rows, columns, NUM_LABELS), IGNORE, np.int8)
    labels[..., KIND] = NOTHING
    labels[..., ROW] = (3 * (np.arange(rows) + 0.5) / rows).astype(int)[:, None]
    labels[..., COLUMN] = (3 * (np.arange(columns) + 0.5) / columns).astype(int)[None]
    cover = alpha.reshape(-1, rows, CELL, columns, CELL).mean((2, 4))
    owner, most = cover.argmax(0), cover.max(0)
    labels[(most > _TOUCHED) & (most < _FULL)] = IGNORE
    for index, thing in enumerate(scene.things):
        labels[(owner == index) & (most >= _FULL)] = _label_of(thing, scene)
    return labels.reshape(-1, NUM_LABELS)


def _label_of(thing: Thing, scene: Scene) -> list[int]:
    row, column = place_of(thing, scene)
    place = [ROWS.index(row), COLUMNS.index(column)]
    if isinstance(thing, Shape):
        return [list(COLORS).index(thing.color), KINDS.index(thing.kind), list(RADII).index(thing.size), *place]
    return [IGNORE, len(KINDS) + SIGNS.index(thing.word), IGNORE, *place]


def patch_masks(alpha: np.ndarray) -> np.ndarray:
    """float32 [4 * N, 49]: the highest opacity of a thing, as a mean over 2 x 2 pixels, of each patch.

    Patches are in the tower's order: cell by cell, and within a cell its 2 x 2 patches.
    """
    height, width = alpha.shape[1:]
    fine = alpha.max(0).reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    return in_tower_order(fine[..., None], PATCH // 2).reshape(-1, MASK_SIDE**2)


def in_tower_order(image: np.ndarray, patch: int) -> np.ndarray:
    """[H, W, C] -> [H / patch * W / patch, patch, patch, C], cell by cell of 2 x 2 patches."""
    height, width, channels = image.shape
    blocks = image.reshape(height // (2 * patch), 2, patch, width // (2 * patch), 2, patch, channels)
    return blocks.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch, patch, channels)
