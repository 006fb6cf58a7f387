"""Bytes of one image file -> square uint8 RGB array, or a `Reject` with a stable reason. Pure CPU functions.

What comes in was found on the web, so nothing is trusted: the format is recognised by its signature alone and handed
to that one parser of Pillow, sizes are judged from the header before a pixel is decoded, and whatever the parser throws
becomes one of `DECODE_REASONS` in one place, `_parsing`.

Formats: JPEG (with MPO, which phones write), PNG (with APNG), WebP, GIF, BMP, TIFF: what web and archive corpora hold.
Left out on purpose: SVG, PDF and EPS are programs rather than pictures; ICO and ICNS hold several pictures; PPM decodes
in a Python loop for odd maxima, which a hostile file can stretch to minutes; AVIF, HEIC and JPEG 2000 bring decoders
larger than all the others together. They are `unsupported_format`: convert such files first.

Departures:
    From LLaVA's `Image.open(...).convert("RGB")`, behind every published number:
    - EXIF orientation is applied: a caption of a picture lying on its side is wrong (test_exif_*).
    - Alpha is composited onto the background instead of dropped: what lies under transparent pixels is arbitrary, most
      often black (test_transparent_*).
    - 16-bit gray is scaled to 8 bits, where Pillow's own conversion clips nearly all of it to white (test_16_bit_*).
    - JPEGs much larger than needed are decoded at 1/2, 1/4 or 1/8 inside the inverse DCT; see `DRAFT_GAP`.
    As there: the first frame stands for an animation; colour profiles are ignored; CMYK JPEGs are taken to be inverted,
    as Adobe writes them and Pillow and the browsers assume.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile

from pipelines.images.formats import OPENERS, format_of, has_end, libtiff_silenced, num_jpeg_scans
from pipelines.images.resize import Raster, resize_crop, resize_pad, upright
from pipelines.images.rgb import to_rgb
from pipelines.images.tiles import Tiles, cut_tiles

DECODE_REASONS = (
    "missing",  # null instead of bytes
    "empty",  # zero bytes
    "too_large_bytes",  # more than max_bytes
    "too_many_pixels",  # the header says more than max_pixels
    "too_small",  # a side under min_side, or so thin that less than a pixel of it is left at the model's resolution
    "unsupported_format",  # not an image, or none of the formats and pixel types decoded here
    "truncated",  # the file ends before the image does
    "corrupt",  # any other damage
)
"""Every reason a `Reject` raised in this module can carry."""

DRAFT_GAP = 2.5
"""A JPEG is decoded reduced only if it stays this many times larger than the output.

Against full decoding, on photographs just large enough for it (336 and 224 pixels, 1/2 to 1/8, both aspects): mean
difference at most 0.71 of 255 levels, 99 % of the values within 4. `draft=False` turns it off.
"""

MAX_JPEG_SCANS = 100
"""More are an attack: each costs a pass over the image and 14 bytes of file. Encoders in use write about ten."""

# What Pillow's parsers throw on damaged files, seen by fuzzing or raised in their source. MemoryError is not among
# them: within max_pixels it means that the machine is short of memory, which is no fault of the image.
_PARSER_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


class Reject(Exception):  # noqa: N818 - an outcome, not an error of the program
    """An image that does not become an array: `reason` is a stable word to count by, `detail` free text for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def mean_color(image_mean: Sequence[float]) -> tuple[int, int, int]:
    """A processor's `image_mean` as LLaVA's padding colour, int(255 * mean): (122, 116, 104) for CLIP's."""
    red, green, blue = (int(255 * mean) for mean in image_mean)
    return red, green, blue


def decode_image(
    data: bytes | None,
    *,
    size: int,
    aspect: Literal["pad", "crop"],
    max_bytes: int,
    max_pixels: int,
    min_side: int,
    background: tuple[int, int, int],
    resolutions: Sequence[Sequence[int]] = (),
    draft: bool = True,
) -> np.ndarray | Tiles:
    """The image as uint8 [size, size, 3], upright, before rescaling and normalisation.

    With `resolutions` (height, width), which LLaVA-1.6 has, it is the image's tiles instead; `aspect` does not matter.

    `aspect="pad"` is LLaVA-1.5's protocol: pad to a square with `background` (`mean_color` of the checkpoint), then
    resize. `aspect="crop"` is CLIP's: shortest edge, then centre. Takes about 4 bytes per pixel of memory for the
    decoded image and as much again for each conversion it needs (three times that with alpha).

    Deterministic. Not for several threads of one process: Pillow's warnings are silenced through the process-wide list.

    Raises:
        Reject: with one of `DECODE_REASONS`; the file is to blame.
        ValueError: for settings that no image could satisfy.
    """
    if aspect not in ("pad", "crop"):
        raise ValueError(f"aspect must be 'pad' or 'crop', got {aspect!r}")
    if min(size, max_bytes, max_pixels, min_side) < 1:
        settings = f"size={size}, max_bytes={max_bytes}, max_pixels={max_pixels}, min_side={min_side}"
        raise ValueError(f"size and limits must be at least 1, got {settings}")
    if data is None:
        raise Reject("missing")
    if not data:
        raise Reject("empty")
    if len(data) > max_bytes:
        raise Reject("too_large_bytes", f"{len(data)} bytes, limit {max_bytes}")

    kind = format_of(data)
    if kind is None:
        raise Reject("unsupported_format", f"begins with {data[:16]!r}")
    with _parsing(kind, data):
        image = OPENERS[kind](io.BytesIO(data))
        width, height = image.size
        _check_size(width, height, size, max_pixels, min_side)
        scale = 1
        if draft and not resolutions and isinstance(image, JpegImagePlugin.JpegImageFile):
            scale = _draft(image, size, max(width, height) if aspect == "pad" else min(width, height))
        _load(image, kind, data)
        if scale == 1:
            width, height = image.size  # loading turns a TIFF upright
        raster = upright(Raster(to_rgb(image, background), width, height, scale), _orientation(image))
    if resolutions:
        return cut_tiles(raster, resolutions, size)
    return resize_pad(raster, size, background) if aspect == "pad" else resize_crop(raster, size)


def _check_size(width: int, height: int, size: int, max_pixels: int, min_side: int) -> None:
    if width * height > max_pixels:
        raise Reject("too_many_pixels", f"{width} x {height}, limit {max_pixels} pixels")
    if min(width, height) < min_side:
        raise Reject("too_small", f"{width} x {height}, smallest side {min_side}")
    if min(width, height) * size < max(width, height):  # also bounds the memory of resizing
        raise Reject("too_small", f"{width} x {height} is thinner than one pixel at {size} x {size}")


def _load(image: ImageFile, kind: str, data: bytes) -> None:
    """Decodes the pixels in place, after the checks that Pillow leaves out."""
    if kind == "PNG":  # load() alone takes pixels whose checksum is wrong
        PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()
    if kind == "JPEG" and num_jpeg_scans(data, MAX_JPEG_SCANS) > MAX_JPEG_SCANS:
        raise Reject("corrupt", f"JPEG: more than {MAX_JPEG_SCANS} scans")
    with libtiff_silenced() if kind == "TIFF" else nullcontext():
        image.load()


def _draft(image: JpegImagePlugin.JpegImageFile, needed: int, side: int) -> int:
    """Asks for the JPEG at 1/scale, so that `side` pixels stay at least DRAFT_GAP * `needed`; returns the scale."""
    scale = next((scale for scale in (8, 4, 2) if side >= scale * DRAFT_GAP * needed), 1)
    if scale == 1:
        return 1
    width, height = image.size
    drafted = image.draft(None, (max(1, width // scale), max(1, height // scale)))
    return round(width / drafted[1][2]) if drafted else 1


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 if there is none; unreadable metadata does not spoil a picture that could be read."""
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except _PARSER_ERRORS:
        return 1


@contextmanager
def _parsing(kind: str, data: bytes) -> Iterator[None]:
    """The one place where what Pillow throws becomes a reason, and where its warnings end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except Image.DecompressionBombError as error:  # WebP's parser allocates, so it looks at the size by itself
            raise Reject("too_many_pixels", _clean(error)) from error
        except _PARSER_ERRORS as error:
            if isinstance(error, NotImplementedError) or re.search("unsupported|unknown pixel mode", str(error), re.I):
                raise Reject("unsupported_format", f"{kind}: {_clean(error)}") from error
            cut = not has_end(kind, data) or (kind == "TIFF" and "truncated" in str(error).lower())
            reason = "truncated" if cut else "corrupt"
            raise Reject(reason, f"{kind}: {_clean(error)}") from error


def _clean(error: Exception) -> str:
    """One printable line without memory addresses, so that equal faults give equal text."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")
    return "".join(char if char.isprintable() else " " for char in text)[:200]
