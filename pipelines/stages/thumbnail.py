"""Small pictures of sampled images for the report."""

import base64
import io

import numpy as np
from PIL import Image as PILImage

from otprune.families import Geometry, Size, overview_tokens
from pipelines.stages.unit_batch import Sample

THUMBNAIL = 224  # pixels of the longer side


def make_sample(pixels: np.ndarray, size: Size, kept: list[int], geometry: Geometry) -> Sample:
    """An image as the report shows it: its thumbnail, and the kept tokens on the grid that covers the picture.

    Of a picture in crops, the sample shows the overview, whose tokens come first or last as its pixels do.

    Args:
        pixels: the picture's frame, uint8.
        kept: the index of each kept token in the picture's sequence.
    """
    last = pixels.ndim == 4 and geometry.frame(size).overview == "last"
    picture = pixels if pixels.ndim == 3 else pixels[-1 if last else 0]
    height, width = picture.shape[:2]
    scale = THUMBNAIL / max(height, width)
    small = PILImage.fromarray(picture).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    small.save(stream := io.BytesIO(), "JPEG", quality=80)
    rows, columns = geometry.grid(size)
    if rows:
        shown = overview_tokens(geometry, size, geometry.num_visual(size)) or range(rows * columns)
        kept = [max(-1, token - shown.start) for token in kept if token < 0 or token in shown]
    return Sample(base64.b64encode(stream.getvalue()).decode(), *small.size, kept, rows, columns)
