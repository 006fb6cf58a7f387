"""Accuracy of what captions of drawn shapes say: colours, sizes and places, given that the shape is there.

The demo world's images show shapes of a few kinds, colours and sizes on a square canvas. A caption is read shape by
shape: the words in front of a kind are its colour and size, those behind it, up to the next one, say where it is:

    a small red circle at the top left , left of a blue ring
      size  color kind        row  column  relation

    color_accuracy   of mentions of a kind that is there, with a colour: is one of this colour there?
    size_accuracy    likewise, among the shapes of that kind and, where it is right, of that colour
    place_accuracy   likewise of the thirds of the canvas that are named, and of relations (left of, above) to the shape
                     that is mentioned next
    described        shapes of the image whose kind is mentioned with their colour / shapes of the image

A shape whose kind is not there is CHAIR's to count (chair.py), and says nothing here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.metrics.chair import Mention, Vocabulary, mentions, split
from pipelines.metrics.sums import ratio

KINDS = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SIDE = 224  # pixels of the canvas

SHAPES = Vocabulary.of({kind: () for kind in KINDS})
COUNTS = ("colors", "right_colors", "sizes", "right_sizes", "places", "right_places", "shapes", "described")

_OF = {"color_accuracy": 0, "size_accuracy": 2, "place_accuracy": 4, "described": 6}  # metric -> its first count

_RELATIONS: dict[str, Callable[["Drawn", "Drawn"], bool]] = {
    "left": lambda a, b: a.x < b.x,
    "right": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A shape of an image: x to the right and y downwards of its centre, as shares of the canvas."""

    kind: str
    color: str
    size: str
    x: float
    y: float

    @property
    def place(self) -> set[str]:
        """The words for the thirds of the canvas in which the centre lies."""
        return {ROWS[min(2, int(3 * self.y))], COLUMNS[min(2, int(3 * self.x))]}


def shapes_of_scene(scene: dict[str, Any], side: float = SIDE) -> list[Drawn]:
    """The shapes of a scene as the demo corpus stores it.

    Raises:
        ValueError: if the scene is of another form.
    """
    try:
        return [Drawn(s["kind"], s["color"], s["size"], s["x"] / side, s["y"] / side) for s in scene["shapes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a scene must hold shapes with kind, color, size, x and y: {error!r}") from error


def shapes_of_caption(caption: str) -> list[Drawn]:
    """The shapes that a true caption describes by colour and size, all in the middle: their places are not known."""
    tokens = split(caption)
    said = mentions(tokens, SHAPES)
    words = [[_adjective(tokens, mention, said, words) or "" for words in (COLORS, SIZES)] for mention in said]
    return [Drawn(mention.name, color, size, 0.5, 0.5) for mention, (color, size) in zip(said, words, strict=True)]


def shape_counts(caption: str, there: Sequence[Drawn]) -> np.ndarray:
    """The counts of one caption, float64 [8] in the order of COUNTS; those of a corpus are their sum."""
    tokens = split(caption)
    said = mentions(tokens, SHAPES)
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    counts["shapes"] = len(there)
    described: set[Drawn] = set()
    candidates = [_judge_adjectives(mention, tokens, said, there, counts) for mention in said]
    for i, mention in enumerate(said):
        color = _adjective(tokens, mention, said, COLORS)
        described.update(shape for shape in candidates[i] if shape.color == color)
        stop = said[i + 1].start if i + 1 < len(said) else len(tokens)
        after = candidates[i + 1] if i + 1 < len(said) else []
        _judge_places(tokens[mention.stop : stop], candidates[i], after, counts)
    counts["described"] = len(described)
    return np.array([counts[name] for name in COUNTS], np.float64)


def shape_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics [...] in [0, 1], from summed counts [..., 8]; 0 for those of `unsaid`."""
    return {name: ratio(sums[..., i + 1], sums[..., i]) for name, i in _OF.items()}


def unsaid(sums: np.ndarray) -> set[str]:
    """The metrics of which summed counts [8] say nothing, such as that of places where captions name none."""
    return {name for name, i in _OF.items() if not sums[i]}


def _judge_adjectives(
    mention: Mention, tokens: Sequence[str], said: Sequence[Mention], there: Sequence[Drawn], counts: dict[str, int]
) -> list[Drawn]:
    """Counts the colour and the size of a mention; returns the shapes that it may mean."""
    meant = [shape for shape in there if shape.kind == mention.name]
    for name, words in (("color", COLORS), ("size", SIZES)):
        word = _adjective(tokens, mention, said, words)
        if meant and word:
            right = [shape for shape in meant if getattr(shape, name) == word]
            counts[f"{name}s"] += 1
            counts[f"right_{name}s"] += bool(right)
            meant = right or meant
    return meant


def _adjective(tokens: Sequence[str], mention: Mention, said: Sequence[Mention], words: Sequence[str]) -> str | None:
    """The last of these words in the three tokens in front of a mention, without those of the mention before."""
    begin = max([0, mention.start - 3, *(other.stop for other in said if other.stop <= mention.start)])
    return next((token for token in reversed(tokens[begin : mention.start]) if token in words), None)


def _judge_places(
    behind: Sequence[str], meant: Sequence[Drawn], after: Sequence[Drawn], counts: dict[str, int]
) -> None:
    """Counts what the tokens behind a mention say of its place, and of its relation to the next mention."""
    if not meant:
        return
    thirds: set[str] = set()
    for i, token in enumerate(behind):
        is_relation = token in ("above", "below") or list(behind[i + 1 : i + 2]) == ["of"]
        if token in _RELATIONS and is_relation:
            if after:
                counts["places"] += 1
                counts["right_places"] += any(_RELATIONS[token](a, b) for a in meant for b in after)
        elif token in ROWS or token in COLUMNS:
            thirds.add(token)
    if thirds:
        counts["places"] += 1
        counts["right_places"] += any(thirds <= shape.place for shape in meant)
