"""Frames in tiles: the overview and the tiles show the whole upright picture once, at full detail."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from otprune.families.llava_next import Tiled
from pipelines.images.decode import Picture, Reject, decode_image
from tests.decoding import MEAN, noise
from tests.hostile import LIMITS, encode, exif_rotated_jpeg

SIDE = 28
TILED = Tiled(side=SIDE, grid_side=2, resolutions=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)), background=MEAN)


def decode(data: bytes, **settings) -> Picture:
    return decode_image(data, geometry=TILED, **LIMITS, **settings)


def canvas_of(picture: Picture) -> np.ndarray:
    """The tiles put together again, as a picture [height, width, 3]."""
    frame = TILED.frame(picture.size)
    tiles = picture.pixels[1:].reshape(frame.rows, frame.columns, SIDE, SIDE, 3)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles])


@pytest.mark.parametrize("size", [(56, 28), (28, 56), (56, 56), (84, 28), (28, 84)])
def test_the_tiles_of_a_picture_as_large_as_its_frame_are_the_picture(size):
    image = noise(*size)
    picture = decode(encode(image, "PNG"))
    assert picture.size == (size[1], size[0])
    np.testing.assert_array_equal(canvas_of(picture), np.asarray(image))
    overview = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(picture.pixels[0], overview)


def test_around_a_picture_of_another_shape_the_frame_is_black_whatever_the_background():
    picture = decode(encode(Image.new("RGB", (56, 20), (200, 100, 50)), "PNG"))
    expected = np.zeros((28, 56, 3), np.uint8)
    expected[4:24] = (200, 100, 50)
    np.testing.assert_array_equal(canvas_of(picture), expected)
    assert (picture.pixels[0] == (200, 100, 50)).all(), "the overview has no bars"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_before_its_frame_is_chosen(orientation):
    data = exif_rotated_jpeg(orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture, expected = decode(data), decode(encode(upright.convert("RGB"), "PNG"))
    assert picture.size == expected.size == (upright.height, upright.width)
    np.testing.assert_array_equal(picture.pixels, expected.pixels)


def test_a_jpeg_that_becomes_tiles_is_decoded_at_full_size():
    data = encode(noise(700, 500), "JPEG")
    np.testing.assert_array_equal(decode(data).pixels, decode(data, draft=False).pixels)


def test_transparent_pixels_show_the_background_in_every_crop():
    picture = decode(encode(Image.new("RGBA", (56, 56), (9, 9, 9, 0)), "PNG"))
    assert (picture.pixels == MEAN).all()


def test_a_picture_too_thin_for_a_tile_is_rejected():
    with pytest.raises(Reject, match="too_small"):
        decode(encode(noise(300, 10), "PNG"))
