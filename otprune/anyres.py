"""LLaVA-1.6's visual tokens: an overview and the tiles of a grid, put together into one sequence.

The tiles' tokens are laid out as the picture, rows that are only padding are cut off, and each row of what is left ends
in a learned newline token; the overview's tokens come first. Written from transformers' `LlavaNextModel`.

Shape suffixes: T crops of one image (the overview first, then its tiles in raster order), N tokens of a crop, D width.
"""

from math import isqrt

import torch
from torch import Tensor


def pack_tiles(crops_TND: Tensor, *, grid: tuple[int, int], image_size: tuple[int, int], newline_D: Tensor) -> Tensor:
    """[tokens, D] of an image of `image_size` (height, width) whose tiles form `grid` (rows, columns).

    Tokens of 24 x 24 a crop and a 2 x 2 grid: 576 + 48 (48 + 1) = 2,928 for a square image, fewer for others.

    Raises:
        ValueError: if the crops are not one more than the grid has tiles, or a crop's tokens form no square.
    """
    (rows, columns), (T, N, D) = grid, crops_TND.shape
    side = isqrt(N)
    if rows * columns + 1 != T or side * side != N:
        raise ValueError(f"crops must be {rows * columns + 1} of a square number of tokens, got {T} of {N}")
    tiles = crops_TND[1:].reshape(rows, columns, side, side, D).transpose(1, 2)
    picture_HWD = _unpad(tiles.reshape(rows * side, columns * side, D), *image_size)
    newlines = newline_D.to(picture_HWD).expand(len(picture_HWD), 1, D)
    return torch.cat([crops_TND[0], torch.cat([picture_HWD, newlines], dim=1).flatten(0, 1)])


def _unpad(picture_HWD: Tensor, image_height: int, image_width: int) -> Tensor:
    """The rows or columns that the image covers, its shape kept and centred."""
    height, width, _ = picture_HWD.shape
    if image_width / image_height > width / height:
        covered = int(round(image_height * (width / image_width), 7))
        margin = (height - covered) // 2
        return picture_HWD[margin : height - margin]
    covered = int(round(image_width * (height / image_height), 7))
    margin = (width - covered) // 2
    return picture_HWD[:, margin : width - margin]
