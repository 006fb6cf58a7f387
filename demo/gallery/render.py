"""Draws scenes of the gallery: RGB with texture, shading, colour jitter and pixel noise.

Every picture is lit by a warm light from the left and a cool one from above, so that a part of a picture shows where in
the picture it lies, as parts of photographs do. A tower with relative positions has nothing else to tell that from.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.gallery.world import Scene, Sign, Thing
from demo.render import FONT, shape_mask
from demo.world import BACKGROUNDS, COLORS

LIGHT = 36  # levels of red from the right to the left border, and of blue from the lower to the upper one
_PLATE = (56, 22)
_SCALE = 4  # plates are drawn larger and averaged down


@dataclass(frozen=True, slots=True)
class Drawing:
    """`pixels` uint8 [H, W, 3]; `alpha` float32 [things, H, W], the opacity of each thing in [0, 1]."""

    pixels: np.ndarray
    alpha: np.ndarray


def render(scene: Scene) -> Drawing:
    """Draws the scene. The same scene gives the same pixels with the same versions of Pillow, numpy and the font."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(scene, rng)
    alpha = np.zeros((len(scene.things), scene.height, scene.width), np.float32)
    for index, thing in enumerate(scene.things):
        mask, color = _drawn(thing, rng)
        top = _corner(thing.y, mask.shape[0], scene.height)
        left = _corner(thing.x, mask.shape[1], scene.width)
        box = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        canvas[box] = canvas[box] * (1 - mask[..., None]) + mask[..., None] * color
        alpha[index][box] = mask
    canvas += rng.integers(-9, 10, canvas.shape, dtype=np.int8)
    return Drawing(np.clip(canvas, 0, 255).astype(np.uint8), alpha)


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """float32 [H, W, 3]: a tint, the two lights, a low-frequency field, and a gradient or stripes at a random angle."""
    height, width = scene.height, scene.width
    down, right = np.mgrid[0:height, 0:width].astype(np.float32)
    noise = Image.fromarray((rng.random((9, 9)) * 255).astype(np.uint8))
    low = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (right * math.cos(angle) + down * math.sin(angle)) / 224
    field = {
        "plain": 8 * low,
        "shaded": 50 * (ramp - ramp.mean()) / max(1.0, float(np.ptp(ramp))) + 8 * low,
        "striped": 16 * np.sin(ramp * 2 * math.pi * rng.uniform(8, 14)) + 8 * low,
        "cloudy": 60 * low,
    }[scene.texture]
    tint = np.array(BACKGROUNDS[scene.background], np.float32) + rng.normal(0, 4, 3).astype(np.float32)
    canvas = tint + field[..., None].repeat(3, -1)
    canvas[..., 0] += LIGHT * (0.5 - right / width)
    canvas[..., 2] += LIGHT * (0.5 - down / height)
    return canvas


def _corner(center: float, side: int, room: int) -> int:
    """The first pixel of a box of `side` pixels around the centre, inside the picture."""
    return max(0, min(round(center - side / 2), room - side))


def _drawn(thing: Thing, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(opacity float32 [h, w], colours float32 [h, w, 3])."""
    if isinstance(thing, Sign):
        plate = _plate(thing.word)
        return np.ones(plate.shape, np.float32), np.repeat(plate[..., None], 3, -1)
    mask = shape_mask(thing.kind, thing.radius)
    side = mask.shape[0]
    shade = 1 + 0.1 * (np.add.outer(np.arange(side), np.arange(side)).astype(np.float32) / side - 1)
    color = np.array(COLORS[thing.color], np.float32) + rng.normal(0, 7, 3).astype(np.float32)
    return mask, color * shade[..., None]


@lru_cache(maxsize=64)
def _plate(word: str) -> np.ndarray:
    """A light plate with a dark word, float32 [22, 56] in levels of grey."""
    width, height = (_SCALE * side for side in _PLATE)
    canvas = Image.new("L", (width, height), 225)
    draw = ImageDraw.Draw(canvas)
    draw.text((width / 2, height / 2), word, font=ImageFont.truetype(str(FONT), 17 * _SCALE), fill=15, anchor="mm")
    return np.asarray(canvas.resize(_PLATE, Image.Resampling.BOX), np.float32)
