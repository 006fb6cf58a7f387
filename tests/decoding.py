"""What the tests of decoding share: settings of a small model, and how to ask for an array or a reject."""

import numpy as np
import pytest
from PIL import Image

from otprune.families.geometry import Color, Fit
from otprune.families.llava import Square
from pipelines.images.decode import DECODE_REASONS, Reject, decode_image
from tests.hostile import LIMITS

MEAN = (122, 116, 104)


def square(size: int = 56, aspect: Fit = "pad", background: Color = MEAN) -> Square:
    """The geometry of a LLaVA-1.5 whose patches are 14 pixels wide."""
    return Square(side=size, num_tokens=(size // 14) ** 2, background=background, fit=aspect)


def decode(
    data: bytes | None, *, size: int = 56, aspect: Fit = "pad", background: Color = MEAN, **settings
) -> np.ndarray:
    """The pixels of an image as LLaVA-1.5 gets them."""
    return decode_image(data, geometry=square(size, aspect, background), **{**LIMITS, **settings}).pixels


def rejected(data: bytes | None, **settings) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(data, **settings)
    assert caught.value.reason in DECODE_REASONS
    return caught.value


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
