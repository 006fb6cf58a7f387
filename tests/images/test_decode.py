"""Decoding: the geometry of LLaVA and CLIP, orientation, reduced decoding, and every pixel type."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from otprune.families.family import CLIP_STD, ImageProcessor
from pipelines.images.decode import Reject
from tests.decoding import MEAN, decode, noise, rejected
from tests.hostile import encode, exif_rotated_jpeg, picture, png_16_bit, tiff

SHAPES = [(64, 48), (48, 64), (501, 333), (333, 501), (57, 56), (20, 13), (336, 336), (1000, 40), (2, 2)]


def clip(image: Image.Image, size: int) -> np.ndarray:
    """What transformers' own CLIP processor hands to normalisation."""
    square = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=square, do_rescale=False, do_normalize=False
    )
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    return pixels.transpose(1, 2, 0)


def padded(image: Image.Image) -> Image.Image:
    """LLaVA's padding by its description: a square of the mean colour, the image in its middle."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def flat(color: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (40, 40), color)


def center(pixels: np.ndarray) -> list[int]:
    return pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].tolist()


# Geometry


@pytest.mark.parametrize("size", [56, 336])
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_what_clips_processor_computes(shape, size):
    image = noise(*shape)
    np.testing.assert_array_equal(decode(encode(image, "PNG"), size=size, aspect="crop"), clip(image, size))


@pytest.mark.parametrize("size", [56, 336])
@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_llavas_padding_followed_by_clips_processor(shape, size):
    image = noise(*shape)
    np.testing.assert_array_equal(decode(encode(image, "PNG"), size=size), clip(padded(image), size))


@pytest.mark.parametrize("shape", [(30, 301), (10, 1000), (99, 500)])
def test_padding_of_tall_portraits_is_within_one_gray_level(shape):
    """Their empty columns are not computed, so filter positions are rounded differently in the seventh digit."""
    image = noise(*shape)
    assert largest_difference(decode(encode(image, "PNG"), size=112), clip(padded(image), 112)) <= 1


def test_mean_color_is_llavas_for_clips_mean():
    processor = ImageProcessor(mean=(0.48145466, 0.4578275, 0.40821073), std=CLIP_STD, settings={})
    assert processor.color == MEAN


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_the_array_is_contiguous_writable_uint8(aspect):
    pixels = decode(encode(picture(), "JPEG"), aspect=aspect)
    assert pixels.shape == (56, 56, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_exif_orientation_is_applied_before_the_geometry(orientation, aspect):
    data = exif_rotated_jpeg(orientation)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = clip(padded(image) if aspect == "pad" else image, 56)
    np.testing.assert_array_equal(decode(data, aspect=aspect), expected)


def test_exif_orientation_of_a_tiff_is_applied_once():
    upright = decode(encode(picture(), "TIFF"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encode(picture().transpose(Image.Transpose.ROTATE_90), "TIFF", exif=exif))
    np.testing.assert_array_equal(turned, upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage" * 9])
def test_exif_that_cannot_be_read_does_not_spoil_the_picture(exif):
    np.testing.assert_array_equal(decode(encode(picture(), "JPEG", exif=exif)), decode(encode(picture(), "JPEG")))


def test_metadata_that_cannot_be_read_does_not_spoil_a_png():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Raw profile type exif", "\nexif\n 4\nnot hexadecimal")
    np.testing.assert_array_equal(decode(encode(picture(), "PNG", pnginfo=notes)), decode(encode(picture(), "PNG")))


# Draft decoding


def photographs(width: int, height: int) -> Image.Image:
    """Real photographs side by side at their own resolution: detail down to the pixel, and hard edges."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    pictures = [Image.open(folder / f"{name}.png").convert("RGB") for name in ("astronaut", "coffee", "chelsea")]
    canvas = Image.new("RGB", (width, height))
    for i, (x, y) in enumerate((x, y) for y in range(0, height, 300) for x in range(0, width, 400)):
        canvas.paste(pictures[i % 3].crop((0, 0, 400, 300)), (x, y))
    return canvas


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(1123, 847), (847, 1123), (1130, 1130)])
def test_draft_decoding_of_a_large_jpeg_stays_close_to_the_exact_result(shape, aspect):
    """Measured at most 0.51 gray levels of mean and 3 at the 99th percentile; the bounds leave room for libjpegs."""
    data = encode(photographs(*shape), "JPEG", quality=90)
    draft, exact = (decode(data, size=112, aspect=aspect, draft=on).astype(int) for on in (True, False))
    difference = np.abs(draft - exact)
    assert 0 < difference.mean() < 1
    assert np.percentile(difference, 99) <= 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_draft_decoding_and_exif_orientation_agree_on_where_the_image_begins(orientation):
    """Sides that 8 does not divide leave a part of a pixel at one edge, which turning moves to another."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photographs(1129, 905), "JPEG", quality=95, exif=exif)
    for aspect in ("pad", "crop"):
        draft, exact = (decode(data, aspect=aspect, draft=on).astype(int) for on in (True, False))
        assert np.abs(draft - exact).mean() < 1.5  # measured 0.92; beyond 4 wherever an edge is misplaced


def test_images_below_twice_the_gap_are_not_drafted():
    data = encode(photographs(2 * 140 - 1, 200), "JPEG")  # 140 = DRAFT_GAP * 56
    np.testing.assert_array_equal(decode(data), decode(data, draft=False))


# Pixel types


def test_cmyk_jpegs_are_inverted_as_adobe_writes_them():
    assert np.abs(np.subtract(center(decode(encode(flat((0, 255, 255, 0), "CMYK"), "JPEG"))), (255, 0, 0))).max() <= 2
    assert np.abs(np.subtract(center(decode(encode(flat((0, 0, 0, 255), "CMYK"), "JPEG"))), (0, 0, 0))).max() <= 2


def test_ycck_jpegs_are_decoded():
    """A YCCK file holds YCbCr of the colour's complement and inverted K, under transform 2 of its Adobe marker."""
    ycc = flat((55, 195, 225)).convert("YCbCr").getpixel((0, 0))
    data = encode(flat((*(255 - value for value in ycc), 0), "CMYK"), "JPEG", quality=100, subsampling=0)
    marker = data.index(b"Adobe")
    data = data[: marker + 11] + b"\x02" + data[marker + 12 :]
    assert np.abs(np.subtract(center(decode(data)), (200, 60, 30))).max() <= 3


def test_16_bit_gray_is_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 56).astype(np.uint16), (56, 1))
    expected = np.round(ramp / 257).astype(np.uint8)  # 65535 / 255
    for data in (png_16_bit(ramp), tiff(ramp, photometric=1), encode(Image.fromarray(ramp), "TIFF")):
        np.testing.assert_array_equal(decode(data), np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_gray_of_a_tiff_may_be_inverted():
    ramp = np.tile(np.linspace(0, 65535, 56).astype(np.uint16), (56, 1))
    np.testing.assert_array_equal(decode(tiff(ramp, photometric=0)), 255 - decode(tiff(ramp, photometric=1)))


def test_16_bit_colour_is_within_one_level_of_the_rounded_value():
    """Pillow keeps the high byte: floor(v / 256), against round(v / 257)."""
    pixels = np.random.default_rng(0).integers(0, 65536, (56, 56, 3), dtype=np.uint16)
    for data in (png_16_bit(pixels), tiff(pixels, photometric=2)):
        assert largest_difference(decode(data), np.round(pixels / 257)) <= 1


def test_16_bit_planes_that_pillow_mixes_up_are_rejected():
    pixels = np.random.default_rng(0).integers(0, 65536, (56, 56, 3), dtype=np.uint16)
    assert rejected(tiff(pixels, photometric=2, planes=2)).reason == "unsupported_format"
    eight = (pixels >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decode(tiff(eight, photometric=2, planes=2)), eight)


def test_float_and_32_bit_pixels_have_no_white_and_are_rejected():
    for pixels, kind in ((np.ones((9, 9), np.float32), 3), (np.ones((9, 9), np.uint32), 1)):
        assert rejected(tiff(pixels, photometric=1, sample_format=kind)).reason == "unsupported_format"


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA"), ("TIFF", "LA"), ("WEBP", "RGBA")]
)
def test_transparent_pixels_show_the_background(mode, kind):
    image = Image.new(mode, (40, 40), (200, 0) if mode == "LA" else (200, 200, 200, 0))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert center(decode(encode(image, kind, **options))) == list(MEAN)
    image.putalpha(255)
    assert center(decode(encode(image, kind, **options))) == [200, 200, 200]


def test_half_transparent_pixels_are_mixed_with_the_background():
    half = center(decode(encode(flat((255, 255, 255, 128), "RGBA"), "PNG"), background=(0, 0, 100)))
    assert np.abs(np.subtract(half, (128, 128, 178))).max() <= 1


def test_gray_that_was_multiplied_by_its_alpha_is_divided_first():
    premultiplied = np.full((40, 40, 2), (100, 128), np.uint8)  # 199 at half opacity
    pixels = center(decode(tiff(premultiplied, photometric=1, alpha=1), background=(0, 0, 0)))
    assert np.abs(np.subtract(pixels, 100)).max() <= 1


def test_transparent_palette_entries_show_the_background():
    image = flat((10, 20, 30)).quantize(4)
    assert center(decode(encode(image, "PNG"))) == [10, 20, 30]
    for transparency in (image.getpixel((0, 0)), bytes(4)):
        assert center(decode(encode(image, "PNG", transparency=transparency))) == list(MEAN)
    assert center(decode(encode(image, "GIF", transparency=image.getpixel((0, 0))))) == list(MEAN)


def test_a_transparent_colour_key_shows_the_background():
    assert center(decode(encode(flat((10, 20, 30)), "PNG", transparency=(10, 20, 30)))) == list(MEAN)
    assert center(decode(encode(flat((10, 20, 30)), "PNG", transparency=(10, 20, 31)))) == [10, 20, 30]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP"])
def test_one_bit_images_are_black_and_white(kind):
    image = Image.new("1", (40, 40), 0)
    image.paste(1, (20, 0, 40, 40))
    pixels = decode(encode(image, kind))
    assert pixels[28, 5].tolist() == [0, 0, 0]
    assert pixels[28, 50].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_stands_for_an_animation(kind):
    frames = [flat((250, 0, 0)), flat((0, 250, 0)), flat((0, 0, 250))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.subtract(center(decode(data)), (250, 0, 0))).max() <= 6  # WebP and MPO are lossy


# Contract


def test_a_reject_survives_the_way_between_processes():
    reject = pickle.loads(pickle.dumps(Reject("corrupt", "JPEG: broken")))
    assert (reject.reason, reject.detail) == ("corrupt", "JPEG: broken")


def test_a_short_machine_is_not_blamed_on_the_image(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode(encode(picture(), "PNG"))


def test_details_hold_no_memory_addresses(monkeypatch):
    def load(self):
        raise OSError(f"cannot read\n{io.BytesIO()!r}")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert rejected(encode(picture(), "PNG")).detail == "PNG: OSError: cannot read <_io.BytesIO object>"


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"max_pixels": 0}, {"min_side": 0}])
def test_settings_that_no_image_could_satisfy_are_the_users_mistake(wrong):
    with pytest.raises(ValueError, match=rf"must be .*, got .*{next(iter(wrong.values()))}"):
        decode(encode(picture(), "PNG"), **wrong)
