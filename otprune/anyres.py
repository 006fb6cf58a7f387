"""The visual tokens of LLaVA-1.6 and OneVision: `pack_tiles` joins those of the overview and of the tiles.

The overview's tokens come first. The tokens of the tiles are laid out as the tiles are in the picture; rows or columns
that hold only padding are cut off; OneVision scales large grids down; and a learned newline token ends each remaining
row. Written from transformers' `LlavaNextModel` and `LlavaOnevisionModel`.

Shape suffixes: T crops of one image (the overview first, then its tiles in raster order), N tokens of a crop, D width.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from otprune.families.llava_next import scaled_down, unpadded


def pack_tiles(
    crops_TND: Tensor, *, grid: tuple[int, int], image_size: tuple[int, int], newline_D: Tensor, most_tiles: int = 0
) -> Tensor:
    """The token sequence [tokens, D] of an image.

    A square image with 24 x 24 tokens a crop and a 2 x 2 grid has 576 + 48 (48 + 1) = 2,928 tokens; other images have
    fewer.

    Args:
        crops_TND: tokens of the overview and of each tile.
        grid: (rows, columns) of tiles.
        image_size: (height, width) in pixels of the original image; only their ratio matters.
        newline_D: the learned newline token.
        most_tiles: a grid of the tokens of many more tiles is scaled down to those of so many, bilinearly; 0: never.

    Raises:
        ValueError: if T is not one more than the number of tiles, or the tokens of a crop form no square.
    """
    (rows, columns), (T, N, D) = grid, crops_TND.shape
    side = isqrt(N)
    if rows * columns + 1 != T or side * side != N:
        raise ValueError(f"crops must be {rows * columns + 1} of a square number of tokens, got {T} of {N}")
    tiles = crops_TND[1:].reshape(rows, columns, side, side, D).transpose(1, 2)
    covered_rows, covered_columns = unpadded(rows * side, columns * side, image_size)
    picture_HWD = tiles.reshape(rows * side, columns * side, D)[
        covered_rows.start : covered_rows.stop, covered_columns.start : covered_columns.stop
    ]
    scaled = scaled_down(len(covered_rows), len(covered_columns), most_tiles * N)
    if scaled != picture_HWD.shape[:2]:
        picture_HWD = interpolate(picture_HWD.permute(2, 0, 1)[None], scaled, mode="bilinear")[0].permute(1, 2, 0)
    newlines = newline_D.to(picture_HWD).expand(len(picture_HWD), 1, D)
    return torch.cat([crops_TND[0], torch.cat([picture_HWD, newlines], dim=1).flatten(0, 1)])
