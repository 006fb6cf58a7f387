"""Takes out of an image file what is no picture: comments, texts, private data, later frames.

Parsers step over such parts in Python and keep them, so that a file of millions of empty ones would cost half a minute
and gigabytes; and a damaged comment would cost the picture, though browsers show it. Here the parts are stepped over
once and a bounded number of times, and a parser gets the picture alone. Pixels are never changed.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.images.directories import check_directories

MAX_PARTS = 100_000
"""Most chunks or segments of a file. Encoders write IDAT chunks of 8 KiB or more: 64 MiB are 8,192 of them."""

MAX_GIF_BLOCKS = 600_000  # most blocks of a GIF: those of a picture hold up to 255 bytes each
MAX_BOXES = 10_000  # most boxes of a JPEG 2000; writers use a dozen
MAX_EXIF_BYTES = 2**20  # of a larger EXIF, the rest or the whole is ignored; cameras write up to 64 KiB
MAX_PROFILE_BYTES = 4 * 2**20  # a larger colour profile is ignored; those of printers take up to 2 MiB

_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"acTL", b"fcTL", b"fdAT")  # without these the picture is another
_PNG_KEPT = (*_PNG_PIXELS, b"eXIf")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # excludes markers without a length: stuffing, fill, restart
_SCAN, _END, _EXIF = b"\xff\xda", b"\xff\xd9", b"\xff\xe1"
_APP_KEPT = {
    0xE0: b"JFIF",
    0xE1: b"Exif\0",
    0xE2: b"ICC_PROFILE\0",
    0xEE: b"Adobe",
}  # application segment -> begins with
_COMMENT = 0xFE


class DamageError(ValueError):
    """The file cannot be a picture; the message says why."""


@dataclass(frozen=True, slots=True)
class Stripped:
    """A file that holds nothing but a picture."""

    data: bytes
    profile: bytes | None = None  # colour profile that was taken out of the file
    ended: bool = True  # False: a JPEG that lacks its end mark
    scans: int = 1  # of a JPEG, without those of what lies behind the picture, such as a phone's video


def strip(kind: str, data: bytes) -> Stripped:
    """The file without what is no picture. Formats that parsers step through in C stay as they are, if they may.

    A PNG without its end gets one: its pixels tell whether they are all there.

    Raises:
        DamageError: if the file has too many parts or values, or pixels with a wrong checksum.
    """
    stripper = _STRIPPERS.get(kind)
    return stripper(data) if stripper else Stripped(data)


def endings(data: bytes) -> list[bytes]:
    """A JPEG without its end mark as several files, which have equal pixels if and only if no pixels are missing.

    Behind the last pixel a decoder ignores what follows. Where pixels are missing, it decodes what follows into pixels:
    nothing, which counts as zeros, or pseudo-random bytes, whose first bit is 1.
    """
    body = data.rstrip(b"\0")  # a download that broke off may end in zeros, which would pass for pixels
    if body.endswith(b"\xff") and len(body) < len(data):
        body += b"\0"  # of a stuffed byte
    body = body.rstrip(b"\xff")
    noise = [bytes((i * i * 7 + 31 * i + first) % 251 for i in range(256)) for first in (0xA5, 0xDB)]
    return [body + tail + _END for tail in (b"", *noise)]


def _strip_png(data: bytes) -> Stripped:
    pieces, profile, position = [data[:8]], None, 8
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, position)
        stop = position + 8 + length
        if stop > len(data) or not name.isalpha():
            # The parser says whether this is the end of a cut file, or damage.
            pieces.append(data[position:])
            return Stripped(b"".join(pieces), profile)
        if name == b"IEND":
            break
        checksum = data[stop : stop + 4]
        sound = int.from_bytes(checksum, "big") == zlib.crc32(memoryview(data)[position + 4 : stop])
        if name in _PNG_PIXELS and not sound and len(checksum) == 4:
            raise DamageError(f"wrong checksum in {name.decode()}")
        if name in _PNG_PIXELS or (name in _PNG_KEPT and sound and length <= MAX_EXIF_BYTES):
            pieces.append(data[position:stop])
            pieces.append(checksum if sound else struct.pack(">I", zlib.crc32(data[position + 4 : stop])))
        elif name == b"iCCP" and sound:
            profile = _png_profile(data[position + 8 : stop])
        position = stop + 4
    else:
        raise DamageError(f"more than {MAX_PARTS} chunks")
    return Stripped(b"".join([*pieces, _PNG_END]), profile)


def _png_profile(body: bytes) -> bytes | None:
    """The colour profile of an iCCP chunk; None if it is damaged or too large."""
    _, _, rest = body.partition(b"\0")
    decompress = zlib.decompressobj()
    try:
        profile = decompress.decompress(rest[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if decompress.eof else None


def _strip_jpeg(data: bytes) -> Stripped:
    """Without comments and the application segments that say nothing about pixels, in front of the first scan."""
    pieces, start, scans, ended, exif = [data[:2]], 0, 0, False, 0
    for position, marker, stop in _jpeg_segments(data):
        if marker == _SCAN:
            start, scans = start or position, scans + 1
        elif marker == _END:
            ended = True
        elif not start and _is_kept(data, position, marker[1]):
            exif += stop - position if marker == _EXIF else 0
            if marker != _EXIF or exif <= MAX_EXIF_BYTES:
                pieces.append(data[position:stop])
    if not start:
        raise DamageError("no scan")
    return Stripped(b"".join([*pieces, data[start:]]), None, ended, scans)


def _is_kept(data: bytes, position: int, code: int) -> bool:
    if code == _COMMENT:
        return False
    if not 0xE0 <= code <= 0xEF:
        return True
    return code in _APP_KEPT and data.startswith(_APP_KEPT[code], position + 4)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yields start, marker and end of each segment of the first image, its end mark last."""
    position = 2
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            return
        marker, position = found[0], found.end()
        if marker != _END:
            position += int.from_bytes(data[position : position + 2], "big")
        yield found.start(), marker, position
        if marker == _END:
            return
    raise DamageError(f"more than {MAX_PARTS} segments")


def _strip_gif(data: bytes) -> Stripped:
    """The header, and the first image with the block that says how it is drawn."""
    position = 13 + _table_bytes(data[10] if len(data) > 10 else 0)
    head, control, blocks = data[:position], b"", 0
    while position < len(data):
        start, code = position, data[position]
        is_image = code == 0x2C
        if is_image:
            position += 10 + _table_bytes(data[position + 9] if position + 9 < len(data) else 0) + 1
        elif code == 0x21:
            position += 2
        else:
            break  # the end, or damage: the parser says which
        while position < len(data) and data[position]:
            position += 1 + data[position]
            if (blocks := blocks + 1) > MAX_GIF_BLOCKS:
                raise DamageError(f"more than {MAX_GIF_BLOCKS} blocks")
        position += 1
        if (blocks := blocks + 1) > MAX_GIF_BLOCKS:
            raise DamageError(f"more than {MAX_GIF_BLOCKS} blocks")
        if is_image:
            end = b";" if position <= len(data) else b""
            return Stripped(head + control + data[start:position] + end)
        if data[start + 1 : start + 2] == b"\xf9":
            control = data[start:position]
    return Stripped(data[:position] if position < len(data) and data[position] == 0x3B else head + data[position:])


def _check_webp(data: bytes) -> Stripped:
    position = 12
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            return Stripped(data)
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    raise DamageError(f"more than {MAX_PARTS} chunks")


def _check_tiff(data: bytes) -> Stripped:
    if problem := check_directories(data):
        raise DamageError(problem)
    return Stripped(data)


def _check_jpeg2000(data: bytes) -> Stripped:
    """Counts the boxes of the file and those of its header. A bare codestream has none."""
    position = 0
    for _ in range(MAX_BOXES):
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if not data.startswith(b"\0\0\0\x0cjP  ") or position + 8 > len(data) or length == 0:
            return Stripped(data)
        if length == 1:
            length = max(int.from_bytes(data[position + 8 : position + 16], "big"), 16)
        position += 8 if name == b"jp2h" else max(length, 8)
    raise DamageError(f"more than {MAX_BOXES} boxes")


def _table_bytes(flags: int) -> int:
    """Bytes of the colour table that the flags of a header announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


_STRIPPERS: dict[str, Callable[[bytes], Stripped]] = {
    "PNG": _strip_png,
    "JPEG": _strip_jpeg,
    "GIF": _strip_gif,
    "WEBP": _check_webp,
    "TIFF": _check_tiff,
    "JPEG2000": _check_jpeg2000,
}
