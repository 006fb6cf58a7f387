"""Small pictures of sampled images for the report."""

import base64
import io

from PIL import Image as PILImage
from torch import Tensor

THUMBNAIL = 224  # pixels a side


def thumbnail(pixels: Tensor) -> str:
    """Pixels uint8 [H, H, 3] as a JPEG of THUMBNAIL pixels a side, in base64."""
    small = PILImage.fromarray(pixels.numpy()).resize((THUMBNAIL, THUMBNAIL))
    small.save(stream := io.BytesIO(), "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
