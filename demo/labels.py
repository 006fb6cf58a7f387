"""Labels for every patch: dense supervision for the vision tower, computed from the opacities of a drawing.

Patches are in raster order, N = 256 of them.
"""

import numpy as np

from demo.language import COLUMNS, ROWS, position_words
from demo.world import COLORS, GRID, KINDS, PATCH, RADII, SIDE, Digit, Scene, Shape

COLOR, KIND, SIZE, ROW, COLUMN, X_BIN, Y_BIN = range(7)  # label columns
NUM_LABELS = 7
NOTHING = len(KINDS) + 10  # the "kind" of a patch without an item, after shapes and digits
IGNORE = -1
CELL = 7  # object masks are predicted in 2 x 2 pixel cells, 7 x 7 of them a patch

_FULL = 0.12  # from this mean opacity of an item on, a patch counts as part of the item
_TOUCHED = 0.01  # above this opacity and below _FULL, a patch is neither item nor background


def patch_labels(scene: Scene, alpha: np.ndarray) -> np.ndarray:
    """int8 [N, 7]: colour, kind, size, row, column, and the item centre's patch column and row; -1 where undefined.

    A background patch has its own place as label, a patch of an item has the place of the item. Patches that an item
    only touches are ignored: all their labels are -1.

    alpha: float32 [items, 224, 224], see `demo.render.Drawing`.
    """
    labels = np.full((GRID, GRID, NUM_LABELS), IGNORE, np.int8)
    patch = np.arange(GRID)
    third = (3 * (patch + 0.5) / GRID).astype(int)
    labels[..., KIND] = NOTHING
    labels[..., ROW], labels[..., COLUMN] = third[:, None], third[None, :]
    labels[..., Y_BIN], labels[..., X_BIN] = patch[:, None], patch[None, :]
    cover = alpha.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4))
    owner, most = cover.argmax(0), cover.max(0)
    labels[(most > _TOUCHED) & (most < _FULL)] = IGNORE
    for index, item in enumerate(scene.items):
        labels[(owner == index) & (most >= _FULL)] = _item_label(item)
    return labels.reshape(-1, NUM_LABELS)


def _item_label(item: Shape | Digit) -> list[int]:
    row, column = position_words(item.x, item.y)
    place = [ROWS.index(row), COLUMNS.index(column), int(item.x / PATCH), int(item.y / PATCH)]
    if isinstance(item, Digit):
        return [IGNORE, len(KINDS) + int(item.value), IGNORE, *place]
    return [list(COLORS).index(item.color), KINDS.index(item.kind), list(RADII).index(item.size), *place]


def patch_masks(alpha: np.ndarray) -> np.ndarray:
    """float32 [N, 49]: the highest opacity of an item, as a mean over each 2 x 2 pixel cell of each patch."""
    cells = alpha.max(0).reshape(SIDE // 2, 2, SIDE // 2, 2).mean((1, 3))
    return cells.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID * GRID, CELL * CELL)
