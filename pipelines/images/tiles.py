"""LLaVA-1.6's crops of one picture: an overview and the tiles of the resolution that wastes least.

Written from transformers' `LlavaNextImageProcessor`: the picture is scaled into the best of the checkpoint's
resolutions, centred on black and cut into tiles; the overview is the whole picture squeezed into one tile.

Departures:
- EXIF orientation and alpha as in `decode.py`; JPEGs are decoded whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

from pipelines.images.resize import Raster

_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, slots=True)
class Tiles:
    """Crops uint8 [1 + rows * columns, side, side, 3] of a picture, overview first, and what the model must know."""

    pixels: np.ndarray
    height: int  # of the picture, upright
    width: int
    rows: int
    columns: int


def cut_tiles(raster: Raster, resolutions: Sequence[Sequence[int]], side: int) -> Tiles:
    """The crops of a picture; `resolutions` are (height, width), multiples of `side`."""
    height, width = best_resolution(raster.height, raster.width, resolutions)
    box = (
        raster.left,
        raster.top,
        raster.left + raster.width / raster.scale,
        raster.top + raster.height / raster.scale,
    )
    if width / raster.width < height / raster.height:
        inner = width, min(ceil(raster.height * (width / raster.width)), height)
    else:
        inner = min(ceil(raster.width * (height / raster.height)), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(raster.pixels.resize(inner, _BICUBIC, box), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    rows, columns = height // side, width // side
    tiles = np.asarray(canvas).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    overview = np.asarray(raster.pixels.resize((side, side), _BICUBIC, box))
    return Tiles(np.concatenate([overview[None], tiles]), raster.height, raster.width, rows, columns)


def best_resolution(height: int, width: int, resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(height, width) of the resolution that shows most pixels of the picture; of several, the smallest waste."""

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - resolution[0] * resolution[1]

    best = max(resolutions, key=merit)
    return best[0], best[1]


def stack_pictures(pictures: Sequence[np.ndarray | Tiles], side: int) -> dict[str, np.ndarray]:
    """The arrays of a unit's pictures: `pixels` [n, side, side, 3], or of tiles [n, most crops, side, side, 3] and
    `sizes` int32 [n, 4]: height, width, rows and columns of each. Fewer crops end in zeros."""
    if not pictures:
        return {"pixels": np.empty((0, side, side, 3), np.uint8)}
    tiles = [picture for picture in pictures if isinstance(picture, Tiles)]
    if not tiles:
        return {"pixels": np.stack([picture for picture in pictures if isinstance(picture, np.ndarray)])}
    pixels = np.zeros((len(tiles), max(len(one.pixels) for one in tiles), side, side, 3), np.uint8)
    for row, one in zip(pixels, tiles, strict=True):
        row[: len(one.pixels)] = one.pixels
    sizes = [(one.height, one.width, one.rows, one.columns) for one in tiles]
    return {"pixels": pixels, "sizes": np.array(sizes, np.int32)}
