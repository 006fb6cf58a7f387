"""Draws scenes: 224 x 224 RGB with texture, shading, colour jitter and pixel noise. 3 to 5 ms a scene on one core."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.world import BACKGROUNDS, COLORS, SIDE, Digit, Scene, Shape

SUPERSAMPLE = 3  # masks are drawn larger by this factor and averaged down, which smooths edges
FONT = (
    Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"
)  # only the font file is used, not the plotting library

_ARM = 0.3  # half the width of a cross's arm
_POLYGONS = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "star": [
        (length * math.sin(math.pi * i / 5), -length * math.cos(math.pi * i / 5))
        for i, length in enumerate([1.05, 0.42] * 5)
    ],
    "cross": [
        *[(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    ],
    "heart": [
        (
            16 * math.sin(t) ** 3 / 17,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in (2 * math.pi * i / 24 for i in range(24))
    ],
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """`pixels` uint8 [224, 224, 3]; `alpha` float32 [items, 224, 224], the opacity of each item in [0, 1]."""

    pixels: np.ndarray
    alpha: np.ndarray


def render(scene: Scene) -> Drawing:
    """Draw the scene. The same scene gives the same pixels with the same versions of Pillow, numpy and the font."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(scene, rng)
    alpha = np.zeros((len(scene.items), SIDE, SIDE), np.float32)
    for index, item in enumerate(scene.items):
        mask, left, top = item_mask(item)
        box = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        shade = 1 + 0.18 * (_XX[box] - item.x / SIDE + _YY[box] - item.y / SIDE)
        color = _item_color(item, scene, rng) * shade[..., None]
        canvas[box] = canvas[box] * (1 - mask[..., None]) + mask[..., None] * color
        alpha[index][box] = mask
    canvas += rng.integers(-9, 10, canvas.shape, dtype=np.int8)
    return Drawing(np.clip(canvas, 0, 255).astype(np.uint8), alpha)


_YY, _XX = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """float32 [224, 224, 3]: a tint plus a low-frequency field, with a gradient or stripes at a random angle."""
    noise = Image.fromarray((rng.random((9, 9)) * 255).astype(np.uint8))
    low = np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    ramp = _XX * math.cos(angle) + _YY * math.sin(angle)
    if scene.texture == "noise":
        field = 20 * low
    elif scene.texture == "gradient":
        field = 60 * (ramp - ramp.mean()) + 10 * low
    elif scene.texture == "stripes":
        field = 14 * np.sin(ramp * 2 * math.pi * rng.uniform(4, 12)) + 10 * low
    else:
        field = 45 * low
    tint = np.array(BACKGROUNDS[scene.background], np.float32)
    return tint + field[..., None] + rng.normal(0, 6, 3).astype(np.float32)


def _item_color(item: Shape | Digit, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    if isinstance(item, Digit):
        return np.array((190, 190, 190) if scene.background == "dark" else (8, 8, 8), np.float32)
    return np.array(COLORS[item.color], np.float32) + rng.normal(0, 7, 3).astype(np.float32)


def item_mask(item: Shape | Digit) -> tuple[np.ndarray, int, int]:
    """(opacity float32 [h, w], left, top) of the box of the item, cut at the border of the image."""
    mask = shape_mask(item.value if isinstance(item, Digit) else item.kind, item.radius)
    left, top = round(item.x - mask.shape[1] / 2), round(item.y - mask.shape[0] / 2)
    cut_left, cut_top = max(0, -left), max(0, -top)
    mask = mask[cut_top : SIDE - top, cut_left : SIDE - left]
    return mask, left + cut_left, top + cut_top


def shape_mask(name: str, radius: float) -> np.ndarray:
    """Opacity of a shape or digit, float32 in [0, 1], centred in a square with an odd side."""
    side = 2 * (math.ceil(radius) + 1) + 1
    canvas = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE), 0)
    draw, center, r = ImageDraw.Draw(canvas), side * SUPERSAMPLE / 2, radius * SUPERSAMPLE
    if name in ("circle", "ring"):
        _disc(draw, center, r * 0.95, 255)
        if name == "ring":
            _disc(draw, center, r * 0.52, 0)
    elif name in _POLYGONS:
        draw.polygon([(center + r * x, center + r * y) for x, y in _POLYGONS[name]], fill=255)
    else:
        draw.text((center, center), name, font=_font(round(r * 2.3)), fill=255, anchor="mm")
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _disc(draw: ImageDraw.ImageDraw, center: float, radius: float, fill: int) -> None:
    draw.ellipse([center - radius, center - radius, center + radius, center + radius], fill=fill)


@lru_cache(maxsize=8)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT), pixels)
