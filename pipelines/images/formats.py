"""The image formats that are decoded: signatures, parsers, and what Pillow does not tell about a file."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

OPENERS = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
"""Format -> what opens a stream of it. Called directly: `Image.open` swallows why a parser refuses a file."""

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of the second header; "BM" alone also begins prose
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # but those without a length: stuffing, fill and restart


def format_of(data: bytes) -> str | None:
    """The key of `OPENERS` that the first bytes stand for; None for everything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return None


def num_jpeg_scans(data: bytes, limit: int) -> int:
    """Scans of the first image in a JPEG file, counted up to `limit` + 1.

    Segments are stepped over, so that thumbnails in them and videos behind the image are not counted.
    """
    scans, position = 0, 2
    while scans <= limit and (marker := _JPEG_MARKER.search(data, position)):
        if marker[0] == b"\xff\xd9":
            break
        scans += marker[0] == b"\xff\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


@contextmanager
def libtiff_silenced() -> Iterator[None]:
    """Discards the process's stderr: libtiff prints a line there per damaged row, and Pillow has no switch for it."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def has_end(kind: str, data: bytes) -> bool:
    """Whether the end of the file is there by the format's own account.

    Asked only of files that could not be read, and surer than the parser's words, which call many a damaged file
    truncated and many a truncated one damaged.
    """
    match kind:
        case "JPEG":
            return b"\xff\xd9" in data[-32:]  # a search of the whole file would find the thumbnail's end
        case "PNG":
            return b"IEND" in data[-32:]
        case "GIF":
            return data.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
        case "BMP":
            return len(data) >= int.from_bytes(data[2:6], "little")
    # TIFF: the directory, which stands last in many files. Strips before it that are cut off say so when read.
    order = "little" if data.startswith(b"II") else "big"
    start = int.from_bytes(data[4:8], order)
    entries = int.from_bytes(data[start : start + 2], order)
    return start + 2 + 12 * entries <= len(data)
