"""Turns a decoded picture into the pixels that a model's vision tower gets, as the model's `Frame` says.

Tiles are written from transformers' `LlavaNextImageProcessor`: the picture is scaled into the frame, centred on black
and cut into tiles. The overview is the whole picture squeezed into one tile. `LlavaOnevisionImageProcessor` does the
same to the picture of a prompt that has one.

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
    """The crops of a picture, uint8 [1 + rows * columns, tile, tile, 3]; the overview comes first."""
    height, width, side = frame.height, frame.width, frame.tile
    # The side that limits the scale fills the canvas; the other one is rounded up, as transformers does.
    if width / raster.width < height / raster.height:
        inner = width, min(ceil(raster.height * (width / raster.width)), height)
    else:
        inner = min(ceil(raster.width * (height / raster.height)), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(raster.pixels.resize(inner, _BICUBIC, raster.box), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    tiles = np.asarray(canvas).reshape(frame.rows, side, frame.columns, side, 3).swapaxes(1, 2)
    overview = np.asarray(raster.pixels.resize((side, side), _BICUBIC, raster.box))
    return np.concatenate([overview[None], tiles.reshape(-1, side, side, 3)])
