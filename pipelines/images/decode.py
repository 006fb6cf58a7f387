"""Decodes the bytes of one image file to the uint8 RGB pixels that a model takes, or raises a `Reject`.

The functions are pure and run on the CPU. Images come from the web, so the decoder trusts nothing. The signature alone
decides which one of Pillow's parsers gets the file. The header's size is checked before a pixel is decoded. `_parsing`,
and no other place, turns an exception of a parser into one of `DECODE_REASONS`.

Formats: JPEG (with MPO, which phones write), PNG (with APNG), WebP, GIF, BMP, TIFF: what web and archive corpora hold.
Left out on purpose: SVG, PDF and EPS are programs rather than pictures; ICO and ICNS hold several pictures; PPM decodes
in a Python loop for odd maxima, which a hostile file can stretch to minutes; HEIC needs a library that Pillow lacks.
AVIF and JPEG 2000 bring decoders larger than all the others together, so they are decoded on request
(`decode.more_formats`). Any other file is rejected as `unsupported_format`: convert it first.

A file is shown as browsers show it. What is no picture (`containers.py`) never costs one: comments, damaged or endless
texts, a missing end mark behind the last pixel. A BMP whose alpha is 0 everywhere is opaque.

Departures:
    From LLaVA's `Image.open(...).convert("RGB")`, which every published number rests on:
    - EXIF orientation is applied: a caption of a picture lying on its side is wrong (test_exif_*).
    - Alpha is composited onto the background instead of dropped: the colour under transparent pixels is arbitrary, most
      often black (test_transparent_*).
    - 16-bit gray is scaled to 8 bits, where Pillow's own conversion clips nearly all of it to white (test_16_bit_*).
    - JPEGs much larger than needed are decoded at 1/2, 1/4 or 1/8 inside the inverse DCT; see `DRAFT_GAP`.
    - Colours are those of the embedded profile (`color.py`), unless `color_profiles` is false (test_profile_*).
    As in LLaVA: the first frame stands for an animation; CMYK JPEGs count as inverted, as Adobe writes them and Pillow
    and the browsers assume.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, JpegImagePlugin
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile

from otprune.families import Frame, Geometry, Size
from pipelines.images.color import to_srgb
from pipelines.images.containers import MAX_EXIF_BYTES, endings, strip
from pipelines.images.formats import ON_REQUEST, OPENERS, format_of, has_end, libtiff_silenced
from pipelines.images.frames import render
from pipelines.images.resize import Raster, upright
from pipelines.images.rgb import to_rgb

DECODE_REASONS = (
    "missing",  # null instead of bytes
    "empty",  # zero bytes
    "too_large_bytes",  # more than max_bytes
    "too_many_pixels",  # the header says more than max_pixels
    "too_small",  # a side is under min_side, or the image is too narrow for the model
    "unsupported_format",  # not an image, or a format or pixel type that is not decoded here
    "truncated",  # the file ends before the image does
    "corrupt",  # any other damage
)
"""Every reason of a `Reject` that this module raises."""

DRAFT_GAP = 2.5
"""A JPEG is decoded at a reduced size only if the reduced image is still this many times larger than the output.

Difference from full decoding, on photographs just large enough to be reduced (336 and 224 pixels, 1/2 to 1/8, both
aspects): at most 0.71 of 255 levels on average, and 99 % of the values within 4. `draft=False` turns reduction off.
"""

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

MAX_JPEG_SCANS = 100
"""A JPEG with more scans is an attack: each scan costs a pass over the image and takes only 14 bytes of the file.

Encoders in use write about ten scans.
"""

MAX_DRAFTED = 4
"""A JPEG may have this many times `max_pixels` if it is decoded at a reduced size within `max_pixels`.

So photographs of 108 and 200 megapixels are captioned within a limit of 100. Progressive JPEGs are left out: libjpeg
holds all their coefficients, whatever the size that it decodes to.
"""

# Exceptions of Pillow's parsers on damaged files, found by fuzzing or read in Pillow's source. MemoryError is left out:
# within max_pixels it means that the machine is short of memory, which is no fault of the image.
_PARSER_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


_NO_PICTURES = {
    "SVG": (b"<svg",),
    "XML or SVG": (b"<?xml",),
    "HTML": (b"<!doctype", b"<html"),
    "JSON": (b"{", b"["),
    "PDF": (b"%pdf",),
    "an archive": (b"pk\3\4", b"\x1f\x8b"),
}
"""What other files are -> how they begin, in lower case."""


class Reject(Exception):  # noqa: N818 - an outcome, not an error of the program
    """An image that cannot become an array. `reason` is a stable word to count by; `detail` is free text for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image as the vision tower gets it."""

    pixels: np.ndarray  # uint8 of the frame's shape, before rescaling and normalisation
    size: Size  # (height, width) of the upright image, in pixels


def decode_image(
    data: bytes | None,
    *,
    geometry: Geometry,
    max_bytes: int,
    max_pixels: int,
    min_side: int,
    draft: bool = True,
    color_profiles: bool = True,
    more_formats: Collection[str] = (),
) -> Picture:
    """The image, upright, in the frame that `geometry` gives an image of its size.

    Decoding takes about 4 bytes of memory per pixel, and as much again for each conversion (three times that with
    alpha). `draft` may decode a JPEG at a reduced size; see `DRAFT_GAP` and `MAX_DRAFTED`. `color_profiles` turns the
    colours of an embedded profile into sRGB. `more_formats` are keys of `ON_REQUEST`.

    The result is deterministic. The function is not thread-safe: it silences Pillow's warnings through the list of
    filters of the whole process.

    Raises:
        Reject: with one of `DECODE_REASONS`, if the file is at fault.
        ValueError: if no image could satisfy the limits.
    """
    if min(max_bytes, max_pixels, min_side) < 1:
        limits = f"max_bytes={max_bytes}, max_pixels={max_pixels}, min_side={min_side}"
        raise ValueError(f"limits must be at least 1, got {limits}")
    data, kind = _recognise(data, max_bytes, more_formats)
    with _parsing(kind, data):
        stripped = strip(kind, data)
        bodies = [stripped.data] if stripped.ended else endings(stripped.data)
        image = OPENERS[kind](io.BytesIO(bodies[0]))
        width, height = image.size
        can_draft = draft and isinstance(image, JpegImagePlugin.JpegImageFile)
        large = width * height > max_pixels
        too_large = Reject("too_many_pixels", f"{width} x {height}, limit {max_pixels} pixels")
        if large and not (can_draft and "progressive" not in image.info and width * height <= MAX_DRAFTED * max_pixels):
            raise too_large
        if min(width, height) < min_side:
            raise Reject("too_small", f"{width} x {height}, smallest side {min_side}")
        frame = _frame(geometry, (height, width))  # turning the image upright changes nothing about what is too narrow
        if stripped.scans > MAX_JPEG_SCANS:
            raise Reject("corrupt", f"JPEG: more than {MAX_JPEG_SCANS} scans")
        scale, reduction = 1, 1.0
        if can_draft and (large or not frame.tile):
            turned = (width, height) if _orientation(image) in SIDEWAYS else (height, width)
            reduction = _reduction(_frame(geometry, turned), turned)
            scale = _draft(image, reduction)
        if image.width * image.height > max_pixels:
            raise too_large
        with libtiff_silenced() if kind == "TIFF" else nullcontext():
            image.load()
        for body in bodies[1:]:
            _check_same(image, body, reduction)
        if scale == 1:
            width, height = image.size  # Pillow turns a TIFF upright while it loads the pixels
        orientation = _orientation(image)
        pixels = _opaque(image) if kind == "BMP" else image
        if color_profiles:
            pixels = to_srgb(pixels, stripped.profile or image.info.get("icc_profile"))
        raster = upright(Raster(to_rgb(pixels, geometry.background), width, height, scale), orientation)
    size = (raster.height, raster.width)
    return Picture(render(raster, _frame(geometry, size), geometry.background), size)


def _frame(geometry: Geometry, size: Size) -> Frame:
    try:
        return geometry.frame(size)
    except ValueError as error:
        raise Reject("too_small", str(error)) from error


def _reduction(frame: Frame, size: Size) -> float:
    """By how much an image shrinks on its way into a frame, along the side that shrinks least."""
    by_side = (size[0] / frame.height, size[1] / frame.width)
    return max(by_side) if frame.fit == "pad" else min(by_side)


def _recognise(data: bytes | None, max_bytes: int, more_formats: Collection[str]) -> tuple[bytes, str]:
    """The bytes, which may be parsed, and the format that their signature stands for."""
    if data is None:
        raise Reject("missing")
    if not data:
        raise Reject("empty")
    if len(data) > max_bytes:
        raise Reject("too_large_bytes", f"{len(data)} bytes, limit {max_bytes}")
    kind = format_of(data)
    if kind is None:
        raise Reject("unsupported_format", f"{_looks_like(data)}, {len(data)} bytes")
    key = next((name for name, allowed in ON_REQUEST.items() if allowed == kind), None)
    if key and key not in more_formats:
        raise Reject("unsupported_format", f"{kind}: decode.more_formats=[{key}] decodes it")
    return data, kind


def _looks_like(data: bytes) -> str:
    """What a file without a known signature is, in words that hold nothing of it."""
    head = data[:256].lstrip().lower()
    for words, marks in _NO_PICTURES.items():
        if head.startswith(marks):
            return words
    return "text" if data[:256].isascii() and b"\0" not in data[:256] else "no known signature"


def _check_same(image: ImageFile, body: bytes, reduction: float) -> None:
    """Raises OSError unless another ending of a JPEG (`endings`) has the same pixels."""
    twin = JpegImagePlugin.jpeg_factory(io.BytesIO(body))
    if image.size != twin.size:
        _draft(twin, reduction)
    twin.load()
    if twin.tobytes() != image.tobytes():
        raise OSError("image file is truncated")


def _opaque(image: Image.Image) -> Image.Image:
    """The image without its alpha, if that is 0 everywhere: writers of BMP leave the fourth byte empty."""
    empty = image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
    return image.convert("RGB") if empty else image


def _draft(image: JpegImagePlugin.JpegImageFile, reduction: float) -> int:
    """Sets the JPEG to decode at 1/scale and returns the scale.

    The scale is the largest of 8, 4, 2, 1 after which the image is still DRAFT_GAP times larger than the output;
    `reduction` is how many times larger it is before.
    """
    scale = next((scale for scale in (8, 4, 2) if reduction >= scale * DRAFT_GAP), 1)
    if scale == 1:
        return 1
    width, height = image.size
    # libjpeg may choose another scale than the one asked for. Pillow returns (mode, box of the image at that scale).
    drafted = image.draft(None, (max(1, width // scale), max(1, height // scale)))
    return round(width / drafted[1][2]) if drafted else 1


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, or 1 if there is none. Unreadable metadata counts as none: the pixels are fine."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except _PARSER_ERRORS:
        return 1


@contextmanager
def _parsing(kind: str, data: bytes) -> Iterator[None]:
    """Turns Pillow's exceptions into a `Reject` and silences Pillow's warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except Image.DecompressionBombError as error:  # the WebP parser allocates memory, so it checks the size itself
            raise Reject("too_many_pixels", _clean(error)) from error
        except _PARSER_ERRORS as error:
            if isinstance(error, NotImplementedError) or re.search("unsupported|unknown pixel mode", str(error), re.I):
                raise Reject("unsupported_format", f"{kind}: {_clean(error)}") from error
            truncated = not has_end(kind, data) or (kind == "TIFF" and "truncated" in str(error).lower())
            reason = "truncated" if truncated else "corrupt"
            raise Reject(reason, f"{kind}: {_clean(error)}") from error


def _clean(error: Exception) -> str:
    """The error as one printable line, without memory addresses and without bytes of the file: b'...'."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")
    text = re.sub(r"""b(['"])(\\.|(?!\1).)*\1""", "bytes", text)
    return "".join(char if char.isprintable() else " " for char in text)[:200]
