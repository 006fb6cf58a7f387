"""Cuts a picture into LLaVA-1.6's crops: an overview, and the tiles of the resolution that suits the picture best.

Written from transformers' `LlavaNextImageProcessor`: the picture is scaled into the best of the checkpoint's
resolutions, centred on black and cut into tiles. The overview is the whole picture squeezed into one tile.

Departures:
- EXIF orientation and alpha are handled as in `decode.py`; JPEGs are decoded at full size.
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
    """The crops of a picture, and the sizes that the model needs to lay out their visual tokens."""

    pixels: np.ndarray  # uint8 [1 + rows * columns, side, side, 3]; the overview comes first
    height: int  # of the upright picture, in pixels
    width: int
    rows: int  # of the grid of tiles
    columns: int


def cut_tiles(raster: Raster, resolutions: Sequence[Sequence[int]], side: int) -> Tiles:
    """The crops of a picture. `resolutions` are (height, width) in pixels, multiples of `side`."""
    height, width = best_resolution(raster.height, raster.width, resolutions)
    box = (
        raster.left,
        raster.top,
        raster.left + raster.width / raster.scale,
        raster.top + raster.height / raster.scale,
    )
    # The side that limits the scale fills the canvas; the other one is rounded up, as transformers does.
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
    """(height, width) of the resolution that shows most pixels of the picture. The smallest waste breaks ties."""

    def effective_pixels_and_waste(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)  # enlarging adds no detail
        return effective, effective - resolution[0] * resolution[1]

    best = max(resolutions, key=effective_pixels_and_waste)
    return best[0], best[1]


def stack_pictures(pictures: Sequence[np.ndarray | Tiles], side: int) -> dict[str, np.ndarray]:
    """The arrays of a unit's `n` pictures.

    Square pictures give `pixels` uint8 [n, side, side, 3]. Pictures in tiles give `pixels` uint8 [n, T, side, side, 3],
    where T is the largest number of crops and zeros fill the rest, and `sizes` int32 [n, 4]: height, width, rows and
    columns of each picture.
    """
    if not pictures:
        return {"pixels": np.empty((0, side, side, 3), np.uint8)}
    tiled = [picture for picture in pictures if isinstance(picture, Tiles)]
    if not tiled:
        return {"pixels": np.stack([picture for picture in pictures if isinstance(picture, np.ndarray)])}
    pixels = np.zeros((len(tiled), max(len(tiles.pixels) for tiles in tiled), side, side, 3), np.uint8)
    for row, tiles in zip(pixels, tiled, strict=True):
        row[: len(tiles.pixels)] = tiles.pixels
    sizes = [(tiles.height, tiles.width, tiles.rows, tiles.columns) for tiles in tiled]
    return {"pixels": pixels, "sizes": np.array(sizes, np.int32)}
