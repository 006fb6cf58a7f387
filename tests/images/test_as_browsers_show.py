"""Pictures look as browsers show them: colour profiles, missing end marks, empty alpha, very large photographs."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.images.color import to_srgb
from pipelines.images.containers import MAX_PARTS, DamageError, strip
from pipelines.images.decode import Reject
from tests.decoding import decode, noise, rejected
from tests.hostile import encode, picture

SRGB = {"r": (0.4361, 0.2225, 0.0139), "g": (0.3851, 0.7169, 0.0971), "b": (0.1431, 0.0606, 0.7139)}


def profile(r=SRGB["r"], g=SRGB["g"], b=SRGB["b"], gamma: float = 2.2) -> bytes:
    """An ICC profile of three primaries (XYZ) and one curve."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = (0.9642, 1.0, 0.8249)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(*white), b"rXYZ": xyz(*r), b"gXYZ": xyz(*g), b"bXYZ": xyz(*b),
        b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    return head + bytes(12) + b"acsp" + bytes(28) + xyz(*white)[8:] + bytes(48) + table + body


SWAPPED = profile(r=SRGB["g"], g=SRGB["b"], b=SRGB["r"])
WIDE = profile((0.7977, 0.2880, 0), (0.1352, 0.7119, 0), (0.0313, 0.0001, 0.8249), 1.8)


def converted(image: Image.Image, to: bytes) -> Image.Image:
    """The same colours, as pixels of another profile."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(to))
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), target, outputMode="RGB")


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Colour profiles


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("icc", [SWAPPED, WIDE], ids=["swapped", "wide"])
def test_profile_of_a_picture_gives_its_colours(kind, icc):
    colors = Image.new("RGB", (40, 40), (200, 90, 40))
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF": {}}[kind]
    data = encode(converted(colors, icc), kind, icc_profile=icc, **options)
    assert distance(decode(data), decode(encode(colors, "PNG"))) <= 3
    assert distance(decode(data, color_profiles=False), decode(encode(colors, "PNG"))) > 20


def test_profile_of_srgb_changes_no_pixel():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = noise(60, 50)
    np.testing.assert_array_equal(decode(encode(image, "PNG", icc_profile=own)), decode(encode(image, "PNG")))


@pytest.mark.parametrize("icc", [b"", b"no profile", SWAPPED[:150], SWAPPED[:16] + b"CMYK" + SWAPPED[20:], bytes(500)])
def test_profile_that_does_not_fit_is_ignored(icc):
    plain = picture()
    for kind in ("PNG", "JPEG"):
        np.testing.assert_array_equal(decode(encode(plain, kind, icc_profile=icc)), decode(encode(plain, kind)))


def test_profile_leaves_alpha_as_it_is():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    shown = to_srgb(image, SWAPPED)
    assert shown.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    np.testing.assert_array_equal(np.asarray(shown)[..., :3], np.asarray(to_srgb(picture(), SWAPPED)))


def test_profile_applies_to_a_palette():
    flat = Image.new("RGB", (40, 40), (200, 90, 40))
    data = encode(converted(flat, SWAPPED).quantize(4), "PNG", icc_profile=SWAPPED)
    assert distance(decode(data), decode(encode(flat, "PNG"))) <= 3


# End marks


@pytest.mark.parametrize("cut", [1, 4, 8, 12, 14])
def test_a_png_that_lacks_its_end_alone_is_whole(cut):
    data = encode(noise(64, 48), "PNG")
    np.testing.assert_array_equal(decode(data[:-cut]), decode(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
@pytest.mark.parametrize("tail", [b"", b"\xff", b"\0" * 600])
def test_a_jpeg_that_lacks_its_end_mark_alone_is_whole(options, tail):
    data = encode(noise(64, 48), "JPEG", **options)
    np.testing.assert_array_equal(decode(data[:-2] + tail), decode(data))


def test_a_large_jpeg_without_its_end_mark_is_drafted():
    data = encode(picture(1200, 900), "JPEG", quality=95)
    np.testing.assert_array_equal(decode(data[:-2]), decode(data))


@pytest.mark.parametrize("tail", [b"", b"\0" * 5000], ids=["cut", "filled with zeros"])
@pytest.mark.parametrize("missing", [20, 200])
def test_a_jpeg_that_lacks_pixels_is_truncated(missing, tail):
    for image in (noise(64, 48), picture(200, 150)):
        data = encode(image, "JPEG")
        assert rejected(data[:-missing] + tail).reason == "truncated"


@pytest.mark.parametrize("missing", range(3, 12))
def test_a_jpeg_that_lacks_few_bytes_is_truncated_or_the_same_picture(missing):
    """The last bytes may hold bits that no pixel needs."""
    data = encode(noise(64, 48), "JPEG")
    try:
        same = np.array_equal(decode(data[:-missing]), decode(data))
    except Reject as reject:
        same = reject.reason == "truncated"
    assert same


# Alpha


@pytest.mark.parametrize(("alpha", "shown"), [(0, [200, 90, 40]), (255, [200, 90, 40])])
def test_a_bmp_with_an_empty_alpha_is_opaque(alpha, shown):
    pixels = bytes((40, 90, 200, alpha)) * 1600
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 40, 40, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    data = struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels
    assert decode(data)[28, 28].tolist() == shown


# Size


def test_a_photograph_beyond_the_limit_is_decoded_at_a_reduced_size():
    data = encode(picture(800, 600), "JPEG", quality=95)
    np.testing.assert_array_equal(decode(data, max_pixels=130_000), decode(data))
    assert rejected(data, max_pixels=119_000).reason == "too_many_pixels"  # more than four times as many
    assert rejected(data, max_pixels=130_000, draft=False).reason == "too_many_pixels"
    slow = encode(picture(800, 600), "JPEG", progressive=True)  # libjpeg would hold all of it
    assert rejected(slow, max_pixels=130_000).reason == "too_many_pixels"


def test_a_reduced_size_must_itself_be_within_the_limit():
    data = encode(picture(120, 120), "JPEG")  # not large enough to be reduced to 56 pixels
    assert rejected(data, max_pixels=10_000).reason == "too_many_pixels"


# Formats on request


@pytest.mark.parametrize(("name", "kind"), [("avif", "AVIF"), ("jpeg2000", "JPEG2000")])
def test_a_format_with_a_large_decoder_is_decoded_on_request(name, kind):
    options = {"quality": 95} if kind == "AVIF" else {}
    data = encode(picture(), kind, **options)
    reject = rejected(data)
    assert reject.reason == "unsupported_format"
    assert f"decode.more_formats=[{name}]" in reject.detail
    assert distance(decode(data, more_formats=[name]), decode(encode(picture(), "PNG"))) <= 12
    assert rejected(data[: len(data) // 2], more_formats=[name]).reason in ("corrupt", "truncated")
    assert rejected(data, more_formats=[name], max_pixels=100).reason == "too_many_pixels"


def test_parts_without_end_are_damage():
    data = encode(picture(), "JPEG")
    with pytest.raises(DamageError, match="more than 100000 segments"):
        strip("JPEG", data[:2] + b"\xff\xfe\0\2" * (MAX_PARTS + 1) + data[2:])
