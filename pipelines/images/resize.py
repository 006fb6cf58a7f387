"""Resizes an RGB image to a uint8 array as the models' processors do, without holding the padding.

A JPEG may have been decoded at 1/scale of its size. The decoder rounds such a raster up to whole pixels, so the true
image is a box with fractional edges inside the raster. Every function here resamples that box. Resampling the whole
raster would shift a 4003 pixel wide photograph, decoded at 1/8, by up to a third of an output pixel.
"""

from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from PIL import Image

_WIDE = 3  # rows of an image are padded only in part if the square is more than this many times wider than the image

_SWAP, _MIRROR, _FLIP = Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
_MOVES = {  # EXIF orientation -> transpositions that turn the image upright, applied in this order
    2: (_MIRROR,),
    3: (_MIRROR, _FLIP),
    4: (_FLIP,),
    5: (_SWAP,),
    6: (_SWAP, _MIRROR),
    7: (_SWAP, _MIRROR, _FLIP),
    8: (_SWAP, _FLIP),
}


@dataclass(frozen=True, slots=True)
class Raster:
    """An RGB image whose pixels are held at 1/scale of the true size."""

    pixels: Image.Image
    width: int  # true size in pixels
    height: int
    scale: int = 1
    left: float = 0.0  # position of the true image's corner within `pixels`
    top: float = 0.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the true image within `pixels`."""
        return (self.left, self.top, self.left + self.width / self.scale, self.top + self.height / self.scale)


def upright(raster: Raster, orientation: int) -> Raster:
    """The raster turned upright by its EXIF `orientation` (1 to 8; any other value means 1)."""
    moves = _MOVES.get(orientation, ())
    pixels = raster.pixels
    for move in moves:
        pixels = pixels.transpose(move)
    width, height = (raster.height, raster.width) if _SWAP in moves else (raster.width, raster.height)
    # The surplus of the rounded-up raster lies right and below. A mirror or a flip moves it to the left or the top.
    left = pixels.width - width / raster.scale if _MIRROR in moves else 0.0
    top = pixels.height - height / raster.scale if _FLIP in moves else 0.0
    return Raster(pixels, width, height, raster.scale, left, top)


def resize_stretch(raster: Raster, height: int, width: int, resample: str = "bicubic") -> np.ndarray:
    """The image as uint8 [height, width, 3], each side scaled by itself.

    At scale 1 the result equals, pixel for pixel, what transformers' processors that work with Pillow compute.
    """
    return np.array(raster.pixels.resize((width, height), Image.Resampling[resample.upper()], raster.box))


def resize_crop(raster: Raster, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3] by CLIP's protocol: shortest edge to `size` (bicubic), then the centre.

    At scale 1 the result equals, pixel for pixel, what `transformers.CLIPImageProcessorPil` computes before it rescales
    and normalises.
    """
    short = min(raster.width, raster.height)
    width, height = (int(size * length / short) for length in (raster.width, raster.height))
    resized = raster.pixels.resize((width, height), Image.Resampling.BICUBIC, raster.box)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))


def resize_pad(raster: Raster, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """The image as uint8 [size, size, 3] by LLaVA's protocol: centre it on a square of `background`, then resize.

    At scale 1 the result equals, pixel for pixel, that of padding the whole image and resizing it (bicubic); portraits
    beyond 3 to 1 may differ by 1 gray level. Bicubic resizing is one pass along the rows and then one along the
    columns. So each axis is padded just before its pass, and columns of pure background are not computed. Time grows
    with the pixels of the image and memory with size * longest side; neither grows with the square of that side.
    """
    side = max(raster.width, raster.height)
    left, top = ((side - length) // 2 / raster.scale for length in (raster.width, raster.height))
    square = side / raster.scale
    narrow = _resize_rows(raster.pixels, left - raster.left, square, size, background)
    # Rows can be pasted at whole pixels only. `start` rounds up, and `first` is where the square begins instead of 0.
    start = ceil(top - raster.top)
    first = start - (top - raster.top)
    padded = Image.new("RGB", (size, max(start + narrow.height, ceil(first + square))), background)
    padded.paste(narrow, (0, start))
    return np.array(padded.resize((size, size), Image.Resampling.BICUBIC, (0, first, size, first + square)))


def _resize_rows(image: Image.Image, offset: float, square: float, size: int, background: tuple) -> Image.Image:
    """Every row of `image`, placed at `offset` (> -1) of `square` background pixels and resized to `size` pixels."""
    step = square / size  # input pixels per output pixel
    reach = 2 * max(step, 1.0)  # input pixels that the bicubic filter looks at to either side
    first, last = 0, size
    if square > _WIDE * image.width:
        # Only output pixels first..last - 1 see the image; all others are background.
        first = max(0, floor((offset - reach) / step))
        last = min(size, ceil((offset + image.width + reach) / step))
    # The canvas covers the input pixels that output pixels first..last look at. Its pixel 0 lies at `origin`, chosen so
    # that the image is pasted at a whole pixel.
    begin = max(0.0, first * step - reach)
    start = ceil(offset - begin)
    origin = offset - start
    length = ceil(min(square, last * step + reach) - origin)
    canvas = Image.new("RGB", (max(length, start + image.width), image.height), background)
    canvas.paste(image, (start, 0))
    box = (first * step - origin, 0, last * step - origin, image.height)
    rows = Image.new("RGB", (size, image.height), background)
    rows.paste(canvas.resize((last - first, image.height), Image.Resampling.BICUBIC, box), (first, 0))
    return rows
