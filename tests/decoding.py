"""What the tests of decoding share: settings of a small model, and how to ask for an array or a reject."""

import numpy as np
import pytest
from PIL import Image

from pipelines.images.decode import DECODE_REASONS, Reject, decode_image
from tests.hostile import LIMITS

MEAN = (122, 116, 104)
SETTINGS = {"size": 56, "aspect": "pad", "background": MEAN, **LIMITS}


def decode(data: bytes | None, **settings) -> np.ndarray:
    return decode_image(data, **{**SETTINGS, **settings})


def rejected(data: bytes | None, **settings) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(data, **settings)
    assert caught.value.reason in DECODE_REASONS
    return caught.value


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
