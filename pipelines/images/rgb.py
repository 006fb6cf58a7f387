"""Converts a decoded Pillow image of any pixel type to 8-bit RGB on a background colour."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

_PLAIN_MODES = ("1", "L", "P", "CMYK", "YCbCr")  # Pillow's own conversion is right for these
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR = 258, 259, 262, 284  # TIFF tags
_WHITE_IS_ZERO, _UNCOMPRESSED, _SEPARATE_PLANES = 0, 1, 2  # values of those tags


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The loaded image in mode RGB: alpha is composited onto `background`, 16-bit gray is scaled by 255 / 65535.

    Scaled gray is rounded. Pillow itself reduces 16-bit colour to 8 bits while it loads: it keeps the high byte, which
    is at most one level from the rounded value.

    Raises:
        NotImplementedError: if the pixel type has no defined white (32-bit integer, float), has no conversion (LAB), or
            is one that Pillow is known to unpack wrongly.
    """
    tags: Mapping = getattr(image, "tag_v2", {})
    raw_planes = tags.get(_PLANAR) == _SEPARATE_PLANES and tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED
    if raw_planes and max(tags.get(_BITS, (1,))) > 8:  # Pillow 13 unpacks these as 8-bit planes, without an error
        raise NotImplementedError("16-bit colour in separate uncompressed planes")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _gray_16_to_8(image, tags).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied alpha; Pillow has no direct conversion to RGBA
            image = image.convert("LA")
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")
    if image.mode in _PLAIN_MODES:
        return image.convert("RGB")
    raise NotImplementedError(f"pixel type {image.mode} has no defined conversion to RGB")


def _gray_16_to_8(image: Image.Image, tags: Mapping) -> Image.Image:
    white = 2 ** tags.get(_BITS, (16,))[0] - 1  # a TIFF may store 12 bits in 16
    gray = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white  # adding white // 2 rounds to nearest
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts such images at 8 bits but not at 16
        gray = 255 - gray
    return Image.fromarray(gray.astype(np.uint8))
