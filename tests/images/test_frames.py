"""Frames in tiles: the overview and the tiles show the whole upright picture once, at full detail."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from otprune.families import Frame
from otprune.families.llava_next import Tiled
from pipelines.images.decode import Picture, Reject, decode_image
from pipelines.images.frames import cut_tiles, render
from pipelines.images.resize import Raster
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


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("overview", ["first", "last"])
def test_a_stretched_picture_fills_its_tiles_and_the_frame_says_where_the_overview_stands(overview, resample):
    image = noise(50, 70)
    frame = Frame(56, 84, "stretch", resample, tile=28, overview=overview)
    crops = render(Raster(image, 50, 70), frame, MEAN)
    assert crops.shape == frame.shape == (7, 28, 28, 3)
    assert crops.dtype == np.uint8
    filter = Image.Resampling[resample.upper()]
    canvas, small = np.asarray(image.resize((84, 56), filter)), np.asarray(image.resize((28, 28), filter))
    tiles = [canvas[y : y + 28, x : x + 28] for y in (0, 28) for x in (0, 28, 56)]
    np.testing.assert_array_equal(crops, np.stack([small, *tiles] if overview == "first" else [*tiles, small]))


def test_a_picture_by_way_of_another_size_has_an_overview_of_its_frame():
    image = noise(50, 70)
    lanczos = Image.Resampling.LANCZOS
    canvas = image.resize((64, 46), lanczos).resize((84, 56), lanczos)
    small, tiles = np.asarray(canvas.resize((28, 28), lanczos)), np.asarray(canvas).reshape(2, 28, 3, 28, 3)
    frame = Frame(56, 84, "stretch", "lanczos", tile=28, overview="last", via=(46, 64))
    crops = render(Raster(image, 50, 70), frame, MEAN)
    np.testing.assert_array_equal(crops[:-1], tiles.swapaxes(1, 2).reshape(6, 28, 28, 3))
    np.testing.assert_array_equal(crops[-1], small)
    alone = render(Raster(image, 50, 70), Frame(28, 28, "stretch", "lanczos", via=(46, 64)), MEAN)
    np.testing.assert_array_equal(alone, np.asarray(image.resize((64, 46), lanczos).resize((28, 28), lanczos)))


def test_where_the_overview_stands_changes_no_pixel_of_a_picture_with_bars():
    raster = Raster(noise(50, 20), 50, 20)
    first, last = (cut_tiles(raster, Frame(56, 84, "contain", tile=28, overview=end)) for end in ("first", "last"))
    np.testing.assert_array_equal(np.roll(first, -1, axis=0), last)


def test_a_picture_too_thin_for_a_tile_is_rejected():
    with pytest.raises(Reject, match="too_small"):
        decode(encode(noise(300, 10), "PNG"))
