"""RGB image -> square uint8 array as LLaVA's and CLIP's processors make it, without ever holding the padding.

A JPEG may have been decoded at 1/scale of its size. Its raster is then rounded up to whole pixels, so the true image is
a box with fractional edges inside it, and everything here resamples that box: without it a 4003 pixel wide photograph
decoded at 1/8 comes out shifted by up to a third of an output pixel.
"""

from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from PIL import Image

_WIDE = 3  # a square this many times wider than the image is not padded whole

_SWAP, _MIRROR, _FLIP = Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
_MOVES = {  # EXIF orientation -> what brings the image upright, in this order
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
    """An RGB image of true size `width` x `height` held at 1/scale; its corner lies at (left, top) of `pixels`."""

    pixels: Image.Image
    width: int
    height: int
    scale: int = 1
    left: float = 0.0
    top: float = 0.0


def upright(raster: Raster, orientation: int) -> Raster:
    """The raster turned as EXIF `orientation` (1 to 8; anything else means 1) asks."""
    moves = _MOVES.get(orientation, ())
    pixels = raster.pixels
    for move in moves:
        pixels = pixels.transpose(move)
    width, height = (raster.height, raster.width) if _SWAP in moves else (raster.width, raster.height)
    left = pixels.width - width / raster.scale if _MIRROR in moves else 0.0
    top = pixels.height - height / raster.scale if _FLIP in moves else 0.0
    return Raster(pixels, width, height, raster.scale, left, top)


def resize_crop(raster: Raster, size: int) -> np.ndarray:
    """[size, size, 3] uint8: CLIP's shortest edge to `size` (bicubic), then the centre.

    At scale 1 pixel for pixel what `transformers.CLIPImageProcessorPil` computes before it rescales and normalises.
    """
    short = min(raster.width, raster.height)
    width, height = (int(size * length / short) for length in (raster.width, raster.height))
    box = (
        raster.left,
        raster.top,
        raster.left + raster.width / raster.scale,
        raster.top + raster.height / raster.scale,
    )
    resized = raster.pixels.resize((width, height), Image.Resampling.BICUBIC, box)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))


def resize_pad(raster: Raster, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """[size, size, 3] uint8: LLaVA's pad to a square with `background`, image centred, then bicubic resize.

    At scale 1 pixel for pixel what padding the whole image and resizing it gives, but for portraits beyond 3 to 1
    (within 1 gray level). Bicubic resizing is one pass along the rows and then one along the columns, so each axis is
    padded just before its pass, and columns of nothing but background are not computed: time grows with the pixels of
    the image, memory with size * longest side, neither with the square of that side.
    """
    side = max(raster.width, raster.height)
    left, top = ((side - length) // 2 / raster.scale for length in (raster.width, raster.height))
    square = side / raster.scale
    narrow = _resize_rows(raster.pixels, left - raster.left, square, size, background)
    start = ceil(top - raster.top)
    first = start - (top - raster.top)
    padded = Image.new("RGB", (size, max(start + narrow.height, ceil(first + square))), background)
    padded.paste(narrow, (0, start))
    return np.array(padded.resize((size, size), Image.Resampling.BICUBIC, (0, first, size, first + square)))


def _resize_rows(image: Image.Image, offset: float, square: float, size: int, background: tuple) -> Image.Image:
    """Every row of `image`, lying `offset` (> -1) into `square` background pixels, resized to `size` pixels."""
    step = square / size  # pixels in per pixel out
    reach = 2 * max(step, 1.0)  # of the bicubic filter to either side
    first, last = 0, size
    if square > _WIDE * image.width:
        first = max(0, floor((offset - reach) / step))
        last = min(size, ceil((offset + image.width + reach) / step))
    # The canvas covers what output pixels first..last look at: whole input pixels, its own pixel 0 at `origin`.
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
