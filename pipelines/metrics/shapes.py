"""Accuracy of what captions of drawn shapes say: colours, sizes and places, given that the shape is there.

The demo worlds' images show shapes of a few kinds, colours and sizes. A caption is read sentence by sentence, and a
sentence shape by shape: the words in front of a kind are its colour and size, those behind it, up to the next one, say
where it is. A place in front of all shapes of a sentence is the place of each that has none of its own. A shape that
stands behind "near the" is told elsewhere, so it has no place here:

    a small red circle at the top left , left of a blue ring
      size  color kind        row  column  relation
    at the top left there is a small red circle near the blue ring and a large green star

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
SIGN = "sign"  # what else the gallery's pictures show
SIDE = 224  # pixels of the canvas

SHAPES = Vocabulary.of({kind: () for kind in KINDS}, no_objects=("square picture", "square image"))
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


def shapes_of_scene(scene: dict[str, Any]) -> list[Drawn]:
    """The shapes of a scene as a demo corpus stores it; without `width` and `height` its canvas is SIDE x SIDE.

    Raises:
        ValueError: if the scene is of another form.
    """
    width, height = scene.get("width", SIDE), scene.get("height", SIDE)
    try:
        return [Drawn(s["kind"], s["color"], s["size"], s["x"] / width, s["y"] / height) for s in scene["shapes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a scene must hold shapes with kind, color, size, x and y: {error!r}") from error


def shapes_of_caption(caption: str) -> list[Drawn]:
    """The shapes that a true caption describes by colour and size.

    A shape lies in the middle of the third that the caption names, and of the canvas where it names none.
    """
    shapes = []
    for tokens in _sentences(caption):
        said = mentions(tokens, SHAPES)
        for i, mention in enumerate(said):
            if _is_told_elsewhere(tokens, mention):
                continue
            color, size = (_adjective(tokens, mention, said, words) or "" for words in (COLORS, SIZES))
            thirds = _told_thirds(tokens, said, i)
            y, x = (
                next(((2 * third + 1) / 6 for third, word in enumerate(words) if word in thirds), 0.5)
                for words in (ROWS, COLUMNS)
            )
            shapes.append(Drawn(mention.name, color, size, x, y))
    return shapes


def shape_counts(caption: str, there: Sequence[Drawn]) -> np.ndarray:
    """The counts of one caption, float64 [8] in the order of COUNTS; those of a corpus are their sum."""
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    counts["shapes"] = len(there)
    described: set[Drawn] = set()
    for tokens in _sentences(caption):
        said = mentions(tokens, SHAPES)
        meant = [_judge_adjectives(mention, tokens, said, there, counts) for mention in said]
        for i, mention in enumerate(said):
            color = _adjective(tokens, mention, said, COLORS)
            described.update(shape for shape in meant[i] if shape.color == color)
            if not _is_told_elsewhere(tokens, mention):
                after = meant[i + 1] if i + 1 < len(said) else []
                _judge_places(_told_thirds(tokens, said, i), _behind(tokens, said, i), meant[i], after, counts)
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
    thirds: set[str],
    behind: Sequence[str],
    meant: Sequence[Drawn],
    after: Sequence[Drawn],
    counts: dict[str, int],
) -> None:
    """Counts what a sentence says of the place of a mention, and of its relation to the next mention."""
    if not meant:
        return
    for i, token in enumerate(behind):
        if _is_relation(behind, i) and after:
            counts["places"] += 1
            counts["right_places"] += any(_RELATIONS[token](a, b) for a in meant for b in after)
    if thirds:
        counts["places"] += 1
        counts["right_places"] += any(thirds <= shape.place for shape in meant)


def _sentences(caption: str) -> list[list[str]]:
    sentences: list[list[str]] = [[]]
    for token in split(caption):
        if token == ".":
            sentences.append([])
        else:
            sentences[-1].append(token)
    return sentences


def _behind(tokens: list[str], said: Sequence[Mention], i: int) -> list[str]:
    """The tokens between mention `i` and the next one, or a sign."""
    behind = tokens[said[i].stop : said[i + 1].start if i + 1 < len(said) else len(tokens)]
    return behind[: behind.index(SIGN)] if SIGN in behind else behind


def _told_thirds(tokens: list[str], said: Sequence[Mention], i: int) -> set[str]:
    """The thirds that a sentence tells of mention `i`: behind it, or in front of all mentions."""
    return _thirds(_behind(tokens, said, i)) or _thirds(tokens[: said[0].start])


def _is_told_elsewhere(tokens: Sequence[str], mention: Mention) -> bool:
    """Whether the mentioned shape is the one that another is "near the"."""
    begin = mention.start
    while begin > 0 and tokens[begin - 1] in (*COLORS, *SIZES):
        begin -= 1
    return list(tokens[max(0, begin - 2) : begin]) == ["near", "the"]


def _thirds(tokens: Sequence[str]) -> set[str]:
    """The words for rows and columns of the canvas, without those of relations."""
    return {t for i, t in enumerate(tokens) if (t in ROWS or t in COLUMNS) and not _is_relation(tokens, i)}


def _is_relation(tokens: Sequence[str], i: int) -> bool:
    """Whether the token says above, below, left of or right of."""
    return tokens[i] in ("above", "below") or (tokens[i] in _RELATIONS and list(tokens[i + 1 : i + 2]) == ["of"])
