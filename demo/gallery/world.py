"""The gallery: pictures of many sizes with one to fourteen things, drawn from a seeded sampler.

A scene is plain data. `demo.gallery.render` draws it, `demo.gallery.language` describes it, `demo.gallery.labels`
labels its cells. A cell is what one visual token sees: 28 x 28 pixels. Lengths are in pixels; x points to the right and
y downwards. Colours, kinds and backgrounds are those of `demo.world`.

Each split draws its scenes from its own seeds (`scene_at`), so no training scene occurs in the corpus.
"""

import math
import random
from dataclasses import asdict, dataclass

from demo.world import BACKGROUNDS, COLORS, KINDS, SPLIT_SIZE, SPLITS, Shape

CELL, PATCH = 28, 14
RADII = {"small": (11.5, 13.0), "large": (24.0, 27.0)}
TEXTURES = ["plain", "shaded", "striped", "cloudy"]
SIGNS = ["open", "exit", "taxi", "stop", "cafe", "bank", "park", "shop", "sale", "milk"]
SIGN_RADIUS = 29.0  # of the circle around a plate of 56 x 22 pixels
SIGN_SHARE = 0.4  # share of scenes with a sign
SIZES = (  # columns and rows of cells, from 168 x 168 to 504 x 336 pixels, some wide and some tall
    *[(6, 6), (8, 6), (6, 8), (8, 8), (10, 7), (7, 10), (11, 8), (8, 11), (10, 10), (14, 8), (8, 14), (12, 9)],
    *[(9, 12), (12, 12), (16, 9), (9, 16), (18, 6), (18, 12)],
)
MAX_THINGS = 14
CELLS_PER_THING = 7  # a picture holds at most one thing for so many cells
CLEARANCE = 3  # least gap between two circumscribed circles


@dataclass(frozen=True, slots=True)
class Sign:
    """One plate with a word: its centre (x, y) and circumscribed radius."""

    word: str
    x: float
    y: float
    radius: float

    @property
    def phrase(self) -> str:
        return f"a sign that says {self.word}"


Thing = Shape | Sign


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes, a sign or none, a background, and the size in cells. `seed` sets noise and shading."""

    shapes: tuple[Shape, ...]
    sign: Sign | None
    background: str
    texture: str
    columns: int
    rows: int
    seed: int

    @property
    def things(self) -> tuple[Thing, ...]:
        return (*self.shapes, self.sign) if self.sign else self.shapes

    @property
    def width(self) -> int:
        return self.columns * CELL

    @property
    def height(self) -> int:
        return self.rows * CELL

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> "Scene":
        shapes = tuple(Shape(**shape) for shape in fields["shapes"])
        sign = Sign(**fields["sign"]) if fields["sign"] else None
        return Scene(**{**fields, "shapes": shapes, "sign": sign})


def scene_at(split: str, index: int, size: tuple[int, int] | None = None) -> Scene:
    """Scene number `index` of a split, the same on every machine and in any order.

    Args:
        size: columns and rows of cells; None draws one of SIZES.

    Raises:
        ValueError: if the split is unknown or the index is outside [0, 2**32).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"index must be in [0, {SPLIT_SIZE}), got {index}")
    return sample_scene(random.Random(f"gallery {split} {index}"), size)


def sample_scene(rng: random.Random, size: tuple[int, int] | None = None) -> Scene:
    """Draws a scene. The order of the random draws must not change: it defines the training data of the checkpoint."""
    columns, rows = size or rng.choice(SIZES)
    wanted = rng.randint(1, max(1, min(MAX_THINGS, columns * rows // CELLS_PER_THING)))
    room = (columns * CELL, rows * CELL)
    placed: list[Thing] = []
    sign = None
    if rng.random() < SIGN_SHARE:
        sign = _try_sign(rng, room)
        placed.append(sign)
    shapes: list[Shape] = []
    for _ in range(400):
        if len(placed) == max(wanted, 1 + bool(sign)):
            break
        if shape := _try_shape(rng, placed, room):
            shapes.append(shape)
            placed.append(shape)
    background, texture = rng.choice(list(BACKGROUNDS)), rng.choice(TEXTURES)
    return Scene(tuple(shapes), sign, background, texture, columns, rows, rng.randrange(1 << 30))


def _try_sign(rng: random.Random, room: tuple[int, int]) -> Sign:
    x, y = (_coordinate(rng, SIGN_RADIUS, side) for side in room)
    return Sign(rng.choice(SIGNS), x, y, SIGN_RADIUS)


def _try_shape(rng: random.Random, placed: list[Thing], room: tuple[int, int]) -> Shape | None:
    """One attempt at a shape. None if it touches another thing, or repeats the colour and kind of one."""
    size = rng.choice(list(RADII))
    radius = rng.uniform(*RADII[size])
    x, y = (_coordinate(rng, radius, side) for side in room)
    color, kind = rng.choice(list(COLORS)), rng.choice(KINDS)
    for other in placed:
        if (x - other.x) ** 2 + (y - other.y) ** 2 < (radius + other.radius + CLEARANCE) ** 2:
            return None
        if isinstance(other, Shape) and (other.color, other.kind) == (color, kind):
            return None
    return Shape(kind, color, size, x, y, radius)


def _coordinate(rng: random.Random, radius: float, side: int) -> float:
    """A centre on the lattice of patches, with the whole circle inside."""
    low, high = math.ceil((radius + 1) / PATCH), math.floor((side - radius - 1) / PATCH)
    return float(PATCH * rng.randint(low, high))
