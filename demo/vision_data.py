"""Batches for the vision stage: windows around the items of scenes, or whole scenes.

Shape suffixes: B images, N visual tokens, H W pixels.
"""

from typing import NamedTuple

import numpy as np

from demo import labels as lab
from demo.render import render
from demo.world import GRID, PATCH, Digit, Scene, Shape

WINDOW = 8  # patches along a side
WINDOWS_PER_SCENE = 4  # drawing a scene costs half as much as training on a window, so windows share a drawing
_JITTER = 2  # largest offset of a window from the centre of its item, in patches


class Batch(NamedTuple):
    """Windows or whole images with their labels."""

    pixels: np.ndarray  # uint8 [B, H, W, 3]
    places: np.ndarray  # int64 [B, N], raster numbers of the patches in the whole image
    labels: np.ndarray  # int8 [B, N, 7], see `demo.labels.patch_labels`
    masks: np.ndarray  # float32 [B, N, 49], see `demo.labels.patch_masks`
    scenes: list[Scene]  # B of them, or B / WINDOWS_PER_SCENE


def window_batch(scenes: list[Scene], rng: np.random.Generator) -> Batch:
    """`WINDOWS_PER_SCENE` windows of each scene, around random items. Digits are rarer, so a digit counts twice."""
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
    """Top and left patch of a window around the item, with a random offset, inside the image."""
    centred = (center / PATCH - WINDOW / 2 + rng.uniform(-_JITTER, _JITTER) for center in (item.y, item.x))
    top, left = (int(np.clip(round(corner), 0, GRID - WINDOW)) for corner in centred)
    return top, left


def whole_batch(scenes: list[Scene]) -> Batch:
    """The scenes as whole images."""
    drawings = [render(scene) for scene in scenes]
    marks = [lab.patch_labels(scene, drawing.alpha) for scene, drawing in zip(scenes, drawings, strict=True)]
    return Batch(
        np.stack([drawing.pixels for drawing in drawings]),
        np.tile(np.arange(GRID**2), (len(scenes), 1)),
        np.stack(marks),
        np.stack([lab.patch_masks(drawing.alpha) for drawing in drawings]),
        scenes,
    )
