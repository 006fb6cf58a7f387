"""The image formats that are decoded: signatures, parsers, and facts about a file that Pillow does not report."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

OPENERS = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
"""The parser of each format, which opens a stream. `Image.open` would hide why a parser refuses a file."""

ON_REQUEST = {"avif": "AVIF", "jpeg2000": "JPEG2000"}
"""Value of `decode.more_formats` -> the format that it allows. Their decoders are larger than all others together."""

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # valid sizes of the second header: "BM" alone may also begin a text


def format_of(data: bytes) -> str | None:
    """The key of `OPENERS` whose signature the data begin with, or None."""
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
    if data[4:8] == b"ftyp" and any(data[at : at + 4] in (b"avif", b"avis") for at in (8, 16, 20, 24, 28)):
        return "AVIF"
    if data.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG2000"
    return None


@contextmanager
def libtiff_silenced() -> Iterator[None]:
    """Discards the stderr of the process: libtiff prints a line for each damaged row, and Pillow cannot turn it off.

    libtiff is C code, so only redirecting file descriptor 2 helps; replacing `sys.stderr` would not.
    """
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def has_end(kind: str, data: bytes) -> bool:
    """Whether the file is complete by the format's own mark or length field.

    The caller asks this only of files that a parser refused. The parser's message is less reliable: it calls many a
    damaged file truncated and many a truncated file damaged.
    """
    match kind:
        case "JPEG":
            return b"\xff\xd9" in data[-32:]  # a search of the whole file would find the end of a thumbnail
        case "PNG":
            return b"IEND" in data[-32:]
        case "GIF":
            return data.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
        case "BMP":
            return len(data) >= int.from_bytes(data[2:6], "little")
        case "AVIF" | "JPEG2000":
            return True  # neither has a mark; their parsers say what they miss
    # TIFF: checks that the directory, which stands last in many files, is complete. Where pixel data stand last
    # instead, the parser itself reports that they are cut off.
    order = "little" if data.startswith(b"II") else "big"
    start = int.from_bytes(data[4:8], order)
    entries = int.from_bytes(data[start : start + 2], order)
    return start + 2 + 12 * entries <= len(data)
