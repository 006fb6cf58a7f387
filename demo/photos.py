"""Real photographs and broken images, to test decoding in every format and colour mode of a web corpus.

The photographs are files of the scikit-image wheel, so nothing is downloaded. The demo model knows only its synthetic
world, so its captions of photographs mean nothing.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

_EXIF_ORIENTATION = 0x0112
_ROTATED_90_CW = 6  # the stored pixels must be turned 90 degrees clockwise to stand upright


def photographs() -> dict[str, bytes]:
    """File name -> encoded bytes of real photographs, in more than a dozen formats and colour modes."""
    return {name: encode(_shipped(source)) for name, (source, encode) in _PHOTOS.items()}


def broken_images() -> dict[str, bytes | None]:
    """Kind of damage -> bytes, or None for a null image. Only `one_pixel` is a valid image."""
    jpeg = _jpeg(_shipped("rocket.jpg"))
    png = _save("PNG")(_shipped("rocket.jpg").resize((64, 64)))
    half = len(png) // 2  # among the pixels: damaged comments alone would leave a whole picture
    return {
        "truncated_jpeg": jpeg[: len(jpeg) // 3],
        "truncated_png": png[: len(png) // 2],
        "zero_bytes": b"",
        "null": None,
        "text": b"this is not an image\n",
        "html": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>gone</body></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>',
        "random_bytes": np.random.default_rng(0).bytes(4096),
        "corrupt_png": png[:half] + bytes(byte ^ 0xFF for byte in png[half : half + 30]) + png[half + 30 :],
        "one_pixel": _save("PNG")(Image.new("RGB", (1, 1), (200, 30, 30))),
        "huge_header": _png_header(60_000, 60_000),
    }


def _shipped(name: str) -> Image.Image:
    image = Image.open(Path(skimage.data.__file__).parent / name)
    image.load()
    return image


def _save(format: str, mode: str | None = None, **options) -> Callable[[Image.Image], bytes]:
    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        (image.convert(mode) if mode else image).save(buffer, format, **options)
        return buffer.getvalue()

    return encode


def _jpeg(image: Image.Image) -> bytes:
    return _save("JPEG", "RGB", quality=90)(image)


def _rotated_jpeg(image: Image.Image) -> bytes:
    """A JPEG stored rotated by 90 degrees, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = _ROTATED_90_CW
    return _save("JPEG", "RGB", quality=90, exif=exif)(image.transpose(Image.Transpose.ROTATE_90))


def _sixteen_bit_png(image: Image.Image) -> bytes:
    """Grey values spread over 0..65535. A decoder that clips values at 255 shows white."""
    values = np.asarray(image.convert("L"), np.uint16) * 257
    return _save("PNG")(Image.fromarray(values))


def _alpha_png(image: Image.Image) -> bytes:
    """A round image with fully transparent corners."""
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    image = image.convert("RGBA")
    image.putalpha(Image.fromarray(((x**2 + y**2 < 1) * 255).astype(np.uint8)))
    return _save("PNG")(image)


def _animated_gif(image: Image.Image) -> bytes:
    """Three frames: the image, its mirror image and its rotation."""
    small = image.convert("RGB").resize((180, 120))
    frames = [small.transpose(turn) for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180)]
    return _save("GIF", save_all=True, append_images=frames, duration=100, loop=0)(small)


def _png_header(width: int, height: int) -> bytes:
    """A PNG whose header announces width x height but whose data hold one row: a decompression bomb in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(b"\0" * (1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


_PHOTOS: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "astronaut.png": ("astronaut.png", _save("PNG", "RGB")),
    "rocket.jpg": ("rocket.jpg", _jpeg),
    "chelsea.webp": ("chelsea.png", _save("WEBP", "RGB", quality=85)),
    "coffee-cmyk.jpg": ("coffee.png", _save("JPEG", "CMYK", quality=90)),
    "coffee-palette.png": ("coffee.png", _save("PNG", "P")),
    "chelsea-alpha.png": ("chelsea.png", _alpha_png),
    "rocket-exif-rotated.jpg": ("rocket.jpg", _rotated_jpeg),
    "moon-16bit.png": ("moon.png", _sixteen_bit_png),
    "camera-grey.jpg": ("camera.png", _save("JPEG", "L", quality=90)),
    "coins.tiff": ("coins.png", _save("TIFF", "L", compression="tiff_lzw")),
    "motorcycle.gif": ("motorcycle_left.png", _save("GIF", "RGB")),
    "chelsea-animated.gif": ("chelsea.png", _animated_gif),
    "hubble-progressive.jpg": ("hubble_deep_field.jpg", _save("JPEG", "RGB", quality=85, progressive=True)),
    "page-bilevel.png": ("page.png", _save("PNG", "1")),
    "grass.bmp": ("grass.png", _save("BMP", "L")),
    "immunohistochemistry-lossless.webp": ("ihc.png", _save("WEBP", "RGB", lossless=True)),
}
