"""The demo world: scenes of one to five shapes, drawn from a seeded sampler.

A scene is plain data. `demo.render` draws it, `demo.language` describes it, `demo.labels` labels its patches. Lengths
are in pixels of a 224 x 224 image; x points to the right and y downwards.

Each split draws its scenes from its own seeds (`scene_at`), so no training scene occurs in the corpus.
"""

import math
import random
from dataclasses import asdict, dataclass

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH  # patches along a side; the vision tower sees GRID * GRID tokens

COLORS = {
    "red": (215, 45, 45),
    "green": (45, 165, 60),
    "blue": (45, 85, 220),
    "yellow": (238, 218, 55),
    "purple": (140, 55, 180),
    "orange": (242, 138, 30),
    "cyan": (70, 210, 220),
    "white": (240, 240, 240),
}
BACKGROUNDS = {"gray": (128, 128, 128), "brown": (112, 84, 62), "dark": (40, 42, 50), "olive": (96, 104, 60)}
KINDS = ["circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart"]
RADII = {"small": (11.5, 13.0), "large": (25.0, 29.0)}
TEXTURES = ["noise", "gradient", "stripes", "blobs"]
DIGITS = [str(value) for value in range(10)]
MAX_SHAPES = 5
DIGIT_RADIUS = 13.0
DIGIT_SHARE = 0.4  # share of scenes with a digit
LATTICE = 7  # centres lie on a grid of half patches; free positions took the vision tower far longer to learn
CLEARANCE = 3  # least gap between two circumscribed circles

SPLITS = ("train", "validation", "corpus")
SPLIT_SIZE = 1 << 32  # number of scenes in a split


@dataclass(frozen=True, slots=True)
class Shape:
    """One drawn shape: centre (x, y) and circumscribed radius in pixels."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.color} {self.kind}"


@dataclass(frozen=True, slots=True)
class Digit:
    """One written digit: centre (x, y) and half its height in pixels."""

    value: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes from left to right, a digit or none, and a background. `seed` sets noise and shading."""

    shapes: tuple[Shape, ...]
    digit: Digit | None
    background: str
    texture: str
    seed: int

    @property
    def items(self) -> tuple[Shape | Digit, ...]:
        return (*self.shapes, self.digit) if self.digit else self.shapes

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> "Scene":
        shapes = tuple(Shape(**shape) for shape in fields["shapes"])
        digit = Digit(**fields["digit"]) if fields["digit"] else None
        return Scene(shapes, digit, fields["background"], fields["texture"], fields["seed"])


def scene_at(split: str, index: int) -> Scene:
    """Scene number `index` of a split, the same on every machine and in any order.

    The seed is text, which `random` hashes. An integer seed is not safe: Python's generator gives the same numbers for
    some pairs of them, such as 3 and 2 * 2**32 + 3, so disjoint ranges of integers shared scenes.

    Raises:
        ValueError: if the split is unknown or the index is outside [0, 2**32).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"index must be in [0, {SPLIT_SIZE}), got {index}")
    return sample_scene(random.Random(f"{split} {index}"))


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene. The order of the random draws must not change: it defines the training data of the checkpoint."""
    wanted = rng.randint(1, MAX_SHAPES)
    shapes: list[Shape] = []
    for _ in range(200):
        if len(shapes) == wanted:
            break
        shape = _try_shape(rng, shapes)
        if shape:
            shapes.append(shape)
    digit = _try_digit(rng, shapes) if rng.random() < DIGIT_SHARE else None
    shapes.sort(key=lambda shape: shape.x)
    background, texture = rng.choice(list(BACKGROUNDS)), rng.choice(TEXTURES)
    return Scene(tuple(shapes), digit, background, texture, rng.randrange(1 << 30))


def _try_shape(rng: random.Random, placed: list[Shape]) -> Shape | None:
    """One attempt at a shape. None if it touches another shape, or repeats the colour and kind of one."""
    size = rng.choice(list(RADII))
    radius = rng.uniform(*RADII[size])
    x, y = _coordinate(rng, radius), _coordinate(rng, radius)
    if not _is_free(x, y, radius, placed):
        return None
    color, kind = rng.choice(list(COLORS)), rng.choice(KINDS)
    if any((shape.color, shape.kind) == (color, kind) for shape in placed):
        return None
    rng.random()  # an unused draw: without it, seeds would give other scenes
    return Shape(kind, color, size, x, y, radius)


def _try_digit(rng: random.Random, placed: list[Shape]) -> Digit | None:
    for _ in range(60):
        x, y = _coordinate(rng, DIGIT_RADIUS), _coordinate(rng, DIGIT_RADIUS)
        if _is_free(x, y, DIGIT_RADIUS, placed):
            return Digit(rng.choice(DIGITS), x, y, DIGIT_RADIUS)
    return None


def _coordinate(rng: random.Random, radius: float) -> float:
    rng.uniform(0, 1)  # an unused draw; see `_try_shape`
    low, high = math.ceil((radius + 1) / LATTICE), math.floor((SIDE - radius - 1) / LATTICE)
    return float(LATTICE * rng.randint(low, high))


def _is_free(x: float, y: float, radius: float, placed: list[Shape]) -> bool:
    return all((x - s.x) ** 2 + (y - s.y) ** 2 >= (radius + s.radius + CLEARANCE) ** 2 for s in placed)
