"""Batches for the vision stage: windows cut from scenes around their items, or whole scenes.

Shape suffixes: B images, N visual tokens, H W pixels.
"""

from typing import NamedTuple

import numpy as np

from demo import labels as lab
from demo.render import render
from demo.world import GRID, PATCH, Digit, Scene, Shape

WINDOW = 8  # patches along a side
WINDOWS_PER_SCENE = 4  # one drawing feeds several windows: drawing costs as much as half a window's training
_JITTER = 2  # patches by which a window may miss its item's centre


class Batch(NamedTuple):
    pixels: np.ndarray  # uint8 [B, H, W, 3]
    places: np.ndarray  # int64 [B, N], raster numbers in the whole image
    labels: np.ndarray  # int8 [B, N, 7], see `demo.labels.patch_labels`
    masks: np.ndarray  # float32 [B, N, 49], see `demo.labels.patch_masks`
    scenes: list[Scene]  # B of them, or B / WINDOWS_PER_SCENE


def window_batch(scenes: list[Scene], rng: np.random.Generator) -> Batch:
    """`WINDOWS_PER_SCENE` windows of each scene, each around an item of it; a digit counts twice, being rarer."""
    parts = []
    for scene in scenes:
        drawing = render(scene)
        marks, masks = lab.patch_labels(scene, drawing.alpha), lab.patch_masks(drawing.alpha)
        targets = scene.items + ((scene.digit,) if scene.digit else ())
        for _ in range(WINDOWS_PER_SCENE):
            top, left = _window_corner(targets[rng.integers(len(targets))], rng)
            places = ((np.arange(WINDOW)[:, None] + top) * GRID + np.arange(WINDOW) + left).ravel()
            cut = (slice(top * PATCH, (top + WINDOW) * PATCH), slice(left * PATCH, (left + WINDOW) * PATCH))
            parts.append((drawing.pixels[cut], places, marks[places], masks[places]))
    pixels, places, marks, masks = (np.stack(column) for column in zip(*parts, strict=True))
    return Batch(pixels, places, marks, masks, scenes)


def _window_corner(item: Shape | Digit, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left patch of a window roughly around the item, inside the image."""
    centred = (center / PATCH - WINDOW / 2 + rng.uniform(-_JITTER, _JITTER) for center in (item.y, item.x))
    top, left = (int(np.clip(round(corner), 0, GRID - WINDOW)) for corner in centred)
    return top, left


def whole_batch(scenes: list[Scene]) -> Batch:
    drawings = [render(scene) for scene in scenes]
    marks = [lab.patch_labels(scene, drawing.alpha) for scene, drawing in zip(scenes, drawings, strict=True)]
    return Batch(
        np.stack([drawing.pixels for drawing in drawings]),
        np.tile(np.arange(GRID**2), (len(scenes), 1)),
        np.stack(marks),
        np.stack([lab.patch_masks(drawing.alpha) for drawing in drawings]),
        scenes,
    )
