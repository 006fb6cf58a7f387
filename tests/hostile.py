"""Images as the web serves them, good, odd and broken, written from bytes: what a job must survive.

`write_hostile_folder` says for every file whether it becomes an array ("ok") or under which reason it is rejected, with
the limits in `LIMITS` or anything near them.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

LIMITS = {"max_bytes": 64 * 2**20, "max_pixels": 100_000_000, "min_side": 2}


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth RGB picture whose corners differ: red grows to the right, green downwards, blue is 128."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).round().astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 2) -> bytes:
    """A PNG with valid checksums and any header over any rows; each row begins with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def png_16_bit(pixels: np.ndarray) -> bytes:
    """uint16 [H, W] or [H, W, 3] as a 16-bit PNG; Pillow writes no 16-bit colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], rows, depth=16, color=0 if pixels.ndim == 2 else 2)


def tiff(pixels: np.ndarray, *, photometric: int, sample_format: int = 1, planes: int = 1, alpha: int = 0) -> bytes:
    """[H, W] or [H, W, C] as an uncompressed little-endian TIFF of one strip (one per channel for `planes=2`).

    `alpha` says what the last channel is: 1 alpha by which the others were multiplied, 2 alpha by itself.
    """
    height, width, channels = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    strips = [pixels[..., c] for c in range(channels)] if planes == 2 else [pixels]
    body = [np.ascontiguousarray(strip).astype(pixels.dtype.newbyteorder("<")).tobytes() for strip in strips]
    lists = {  # tag -> values; lists longer than 4 bytes lie after the directory
        256: (width,), 257: (height,), 258: (pixels.dtype.itemsize * 8,) * channels, 259: (1,),
        262: (photometric,), 273: (0,) * len(strips), 277: (channels,), 278: (height,),
        279: tuple(map(len, body)), 284: (planes,), 339: (sample_format,) * channels,
    }  # fmt: skip
    if alpha:
        lists = dict(sorted({**lists, 338: (alpha,)}.items()))
    start = 8 + 2 + 12 * len(lists) + 4
    tail_length = sum(4 * len(values) for values in lists.values() if len(values) > 1)
    lists[273] = tuple(start + tail_length + sum(map(len, body[:i])) for i in range(len(body)))
    entries, tail = b"", b""
    for tag, values in lists.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        value = packed if len(values) == 1 else struct.pack("<I", start + len(tail))
        tail += packed if len(values) > 1 else b""
        entries += struct.pack("<HHI", tag, 4, len(values)) + value
    return struct.pack("<2sHIH", b"II", 42, 8, len(lists)) + entries + bytes(4) + tail + b"".join(body)


def exif_rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(), "JPEG", exif=exif)


def _with_alpha(mode: str) -> Image.Image:
    image = picture().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


_SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
_HTML = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>"

FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain.jpg": (lambda: encode(picture(), "JPEG"), "ok"),
    "progressive.jpg": (lambda: encode(picture(), "JPEG", progressive=True), "ok"),
    "gray.jpg": (lambda: encode(picture().convert("L"), "JPEG"), "ok"),
    "cmyk.jpg": (lambda: encode(picture().convert("CMYK"), "JPEG"), "ok"),
    "exif_rotated.jpg": (lambda: exif_rotated_jpeg(6), "ok"),
    "phone.mpo.jpg": (lambda: encode(picture(), "MPO", save_all=True, append_images=[picture()]), "ok"),
    "a png named.jpg": (lambda: encode(picture(), "PNG"), "ok"),
    "gray_16_bit.png": (lambda: png_16_bit(np.full((40, 50), 40_000, np.uint16)), "ok"),
    "rgb_16_bit.png": (lambda: png_16_bit(np.full((40, 50, 3), 40_000, np.uint16)), "ok"),
    "palette_alpha.png": (lambda: encode(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))), "ok"),
    "rgba.png": (lambda: encode(_with_alpha("RGB"), "PNG"), "ok"),
    "la.png": (lambda: encode(_with_alpha("L"), "PNG"), "ok"),
    "one_bit.png": (lambda: encode(picture().convert("1"), "PNG"), "ok"),
    "animated.gif": (lambda: encode(picture(), "GIF", save_all=True, append_images=[picture().rotate(90)]), "ok"),
    "animated.webp": (lambda: encode(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]), "ok"),
    "plain.webp": (lambda: encode(picture(), "WEBP"), "ok"),
    "scan.tiff": (lambda: encode(picture(), "TIFF", compression="tiff_lzw"), "ok"),
    "plain.bmp": (lambda: encode(picture(), "BMP"), "ok"),
    "banner.png": (lambda: encode(picture(728, 90), "PNG"), "ok"),
    "Ünïcödé 图片 with spaces.jpg": (lambda: encode(picture(), "JPEG"), "ok"),
    "50% #1 [draft] 'a'&b=c;d+e.png": (lambda: encode(picture(), "PNG"), "ok"),
    "album.jpg/inside.PNG": (lambda: encode(picture(), "PNG"), "ok"),  # a directory named like an image
    "zero_bytes.jpg": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"This is not a picture.\n" * 9, "unsupported_format"),
    "html.png": (lambda: _HTML, "unsupported_format"),
    "drawing.svg": (lambda: _SVG, "unsupported_format"),
    "svg_named.png": (lambda: _SVG, "unsupported_format"),
    "document.jpg": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "unsupported_format"),
    "depth.tif": (lambda: tiff(np.ones((40, 50), np.float32), photometric=1, sample_format=3), "unsupported_format"),
    "truncated.jpg": (lambda: _half(encode(picture(), "JPEG")), "truncated"),
    "truncated.png": (lambda: _half(encode(picture(), "PNG")), "truncated"),
    "truncated.gif": (lambda: _half(encode(picture(), "GIF")), "truncated"),
    "truncated.webp": (lambda: _half(encode(picture(), "WEBP")), "truncated"),
    "signature_only.png": (lambda: encode(picture(), "PNG")[:8], "truncated"),
    "wrong_checksum.png": (lambda: _flip(encode(picture(), "PNG"), -30), "corrupt"),
    "wrong_header.jpg": (lambda: b"\xff\xd8\xff\xe0" + b"\0" * 200 + b"\xff\xd9", "corrupt"),
    "one_pixel.gif": (lambda: encode(picture(1, 1), "GIF"), "too_small"),
    "one_pixel.png": (lambda: encode(picture(1, 1), "PNG"), "too_small"),
    "ruler.png": (lambda: encode(picture(4000, 2), "PNG"), "too_small"),
    "60000x60000.png": (lambda: png(60_000, 60_000, b""), "too_many_pixels"),
    "60000x60000.gif": (lambda: _gif_canvas(60_000), "too_many_pixels"),
}
"""File name -> (what writes its bytes, expected outcome)."""


def write_hostile_folder(path: str | Path) -> dict[str, str]:
    """Writes `FILES` under `path`; returns file name (relative, "/" between folders) -> "ok" or the expected reason."""
    expected = {}
    for name, (build, outcome) in FILES.items():
        file = Path(path) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(build())
        expected[name] = outcome
    return expected


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 0x55
    return bytes(damaged)


def _gif_canvas(side: int) -> bytes:
    data = bytearray(encode(picture(), "GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)
