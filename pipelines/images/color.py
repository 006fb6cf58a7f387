"""Turns the colours that a picture's own profile describes into sRGB, as browsers do.

An embedded ICC profile decides; PNG's gAMA and cHRM chunks, which a few old files have instead, are ignored. A profile
that is damaged, or of another kind of pixels than the picture's, is ignored as well.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's mode -> colour space in a profile's header
_SAME = 2  # a profile that moves no colour by more levels is sRGB, of which there are many versions


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The loaded image in sRGB, with its alpha. Unchanged if there is no profile that fits it."""
    if not profile:
        return image
    if image.has_transparency_data and image.mode != "LA":
        return _with_alpha(image.convert("RGBA"), "RGB", profile)
    if image.mode == "LA":
        return _with_alpha(image, "L", profile)
    flat = image.convert("RGB") if image.mode in ("P", "YCbCr") else image
    transform = _transform(profile, flat.mode)
    return image if transform is None else transform.apply(flat)


def _with_alpha(image: Image.Image, mode: str, profile: bytes) -> Image.Image:
    transform = _transform(profile, mode)
    if transform is None:
        return image
    colors = transform.apply(image.convert(mode))
    colors.putalpha(image.getchannel("A"))
    return colors


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of pixels of `mode` to sRGB; None if the profile does not fit them, is damaged, or is sRGB."""
    if mode not in _SPACES or profile[16:20] != _SPACES[mode].encode():
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK":
            probe = _probe(mode)
            moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
            if np.abs(moved).max() <= _SAME:
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform


def _probe(mode: str) -> Image.Image:
    """Colours from all over the cube, or all levels of gray."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, 81, 3))
