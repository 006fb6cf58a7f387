"""Scaling both sides of a picture by themselves, of rasters at full size, turned, and decoded at a reduced size."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import SiglipImageProcessorPil

from pipelines.images.resize import Raster, resize_stretch, upright
from tests.decoding import noise
from tests.hostile import encode, exif_rotated_jpeg, picture

SHAPES = [(64, 48), (48, 64), (501, 333), (57, 56), (20, 13), (336, 336), (1000, 40), (2, 2)]  # (width, height)


@pytest.mark.parametrize("target", [(56, 56), (28, 84), (384, 384)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("resample", "number"), [("bicubic", 3), ("lanczos", 1), ("bilinear", 2)])
def test_stretching_is_what_siglips_processor_computes(shape, target, resample, number):
    image, (height, width) = noise(*shape), target
    processor = SiglipImageProcessorPil(
        size={"height": height, "width": width},
        resample=number,
        do_rescale=False,
        do_normalize=False,
        do_convert_rgb=False,
    )
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = resize_stretch(Raster(image, *image.size), height, width, resample)
    assert (got.shape, got.dtype, got.flags.writeable) == ((height, width, 3), np.uint8, True)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_before_it_is_stretched(orientation):
    image = Image.open(io.BytesIO(exif_rotated_jpeg(orientation)))
    turned = ImageOps.exif_transpose(image)
    expected = np.asarray(turned.resize((40, 56), Image.Resampling.BICUBIC))
    got = resize_stretch(upright(Raster(image.convert("RGB"), *image.size), orientation), 56, 40)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_of_a_reduced_raster_only_the_true_picture_is_stretched(orientation):
    """Sides that 8 does not divide leave a part of a pixel at one edge, which turning moves to another."""
    data = encode(picture(1001, 801), "JPEG", quality=95, subsampling=0)
    whole, reduced = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    reduced.draft(None, (1001 // 8, 801 // 8))
    assert reduced.size == (126, 101)  # 125.125 x 100.125 pixels, rounded up
    exact, got = (
        resize_stretch(upright(Raster(image.convert("RGB"), 1001, 801, scale), orientation), 10, 10).astype(int)
        for image, scale in ((whole, 1), (reduced, 8))
    )
    assert np.abs(got - exact).max() <= 1
    all_of_it = upright(Raster(reduced.convert("RGB"), 1008, 808, 8), orientation)
    assert np.abs(resize_stretch(all_of_it, 10, 10).astype(int) - exact).max() > 1
