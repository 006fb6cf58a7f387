"""Turns a decoded picture into the pixels that a model's vision tower gets, as the model's `Frame` says.

Tiles are written from transformers' `LlavaNextImageProcessor` and `GotOcr2ImageProcessor`: the picture is scaled into
the frame and centred on black, or stretched to the frame, and cut into tiles. The overview is the whole picture
squeezed into one tile. LLaVA-OneVision's processor does to a single picture what LLaVA-1.6's does. As transformers'
`Idefics3ImageProcessor` does, a frame that says so gets the picture by way of another size, and the overview is then
made of the frame.

Departures:
- EXIF orientation and alpha are handled as in `decode.py`; JPEGs that become tiles are decoded at full size.
"""

from math import ceil

import numpy as np
from PIL import Image

from otprune.families import Frame
from pipelines.images.resize import Raster, resize_crop, resize_pad, resize_stretch

_BICUBIC = Image.Resampling.BICUBIC


def render(raster: Raster, frame: Frame, background: tuple[int, int, int]) -> np.ndarray:
    """The picture as uint8 of `frame.shape`. `background` is the colour of bars, except around tiles."""
    if frame.via:
        raster = _held(resize_stretch(raster, *frame.via, frame.resample))
    if frame.tile:
        return cut_tiles(raster, frame)
    match frame.fit:
        case "stretch":
            return resize_stretch(raster, frame.height, frame.width, frame.resample)
        case "crop":
            return resize_crop(raster, frame.width)
        case "pad":
            return resize_pad(raster, frame.width, background)
        case "contain":
            raise ValueError("a frame with bars on its sides must have tiles")


def cut_tiles(raster: Raster, frame: Frame) -> np.ndarray:
    """The crops of a picture, uint8 [1 + rows * columns, tile, tile, 3]; the frame says where the overview stands."""
    side = frame.tile
    if frame.fit == "stretch":
        resample = frame.resample
        canvas = resize_stretch(raster, frame.height, frame.width, resample)
    else:
        resample = "bicubic"
        canvas = np.asarray(_contained(raster, frame))
    tiles = canvas.reshape(frame.rows, side, frame.columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    overview = resize_stretch(_held(canvas) if frame.via else raster, side, side, resample)[None]
    return np.concatenate([overview, tiles] if frame.overview == "first" else [tiles, overview])


def _held(pixels: np.ndarray) -> Raster:
    """A raster of all pixels of a picture."""
    return Raster(Image.fromarray(pixels), pixels.shape[1], pixels.shape[0])


def _contained(raster: Raster, frame: Frame) -> Image.Image:
    """The frame in black, with the largest copy of the picture that fits in its middle."""
    height, width = frame.height, frame.width
    # The side that limits the scale fills the canvas; the other one is rounded up, as transformers does.
    if width / raster.width < height / raster.height:
        inner = width, min(ceil(raster.height * (width / raster.width)), height)
    else:
        inner = min(ceil(raster.width * (height / raster.height)), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(raster.pixels.resize(inner, _BICUBIC, raster.box), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas
