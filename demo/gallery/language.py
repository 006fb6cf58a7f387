"""Texts about a scene of the gallery: long and short captions, references, and eight kinds of questions with answers.

A long caption names the picture, then place by place every thing with its size, colour, kind and nearest neighbour,
then the empty places and the totals. It has 60 to 150 words. The vocabulary is closed; single spaces separate all
tokens, punctuation included.
"""

import random
from collections.abc import Callable, Sequence

from demo.gallery.world import SIGNS, TEXTURES, Scene, Sign, Thing
from demo.language import COLUMNS, ROWS
from demo.language import question as shape_question
from demo.world import BACKGROUNDS, COLORS, KINDS, RADII, Shape

LONG_PROMPT = "describe the image in detail ."
SHORT_PROMPT = "describe the image ."
TASKS = ["exist", "attr", "where", "rel", "count", "mc", "text", "bg"]
NUMBERS = [
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
]  # as numbers of things; NUMBERS[0] is the word for none
PLACES = [(row, column) for row in ROWS for column in COLUMNS]  # in reading order
FORMS = ["wide", "square", "tall"]
NEIGHBOURS_UP_TO = 8  # crowded pictures are told without neighbours
SHORT_NAMES = 3  # things that a short caption names
_FRAME_WORDS = (
    "describe the image in detail . , a an and picture of thing things on background at there is are nothing near that "
    "says sign all empty shape shapes it more left right above below what color size where how many yes no A B C D "
    "does say ?"
)


def long_caption(scene: Scene) -> str:
    """Every thing in reading order of its place, then the empty places and the totals."""
    sentences = [f"{_opening(scene)} {_ground(scene)} ."]
    by_place = {place: _inside(scene, place) for place in PLACES}
    with_neighbour = len(scene.things) <= NEIGHBOURS_UP_TO
    for place, things in by_place.items():
        if things:
            told = [_told(thing, scene, with_neighbour) for thing in things]
            sentences.append(f"at the {' '.join(place)} there is {_join(told)} .")
    if empty := [f"the {' '.join(place)}" for place, things in by_place.items() if not things]:
        sentences.append(f"{_join(empty)} {'is' if len(empty) == 1 else 'are'} empty .")
    return " ".join([*sentences, _totals(scene)])


def long_references(scene: Scene) -> list[str]:
    """Three true long captions: `long_caption`, its places from the left to the right, and without neighbours."""
    by_columns = sorted(PLACES, key=lambda place: COLUMNS.index(place[1]))
    told = []
    for place in by_columns:
        if things := _inside(scene, place):
            told.append(f"{_join([thing.phrase for thing in things])} at the {' '.join(place)}")
    plain = f"{_opening(scene)} {_ground(scene)} . there is {' , '.join(told)} . {_totals(scene)}"
    named = [f"{_told(thing, scene, True)}" for place in by_columns for thing in _inside(scene, place)]
    joined = f"{_opening(scene)} : {_join(named)} {_ground(scene)} . {_totals(scene)}"
    return [long_caption(scene), plain, joined]


def short_caption(scene: Scene) -> str:
    """The first three things in the order of the long caption, the number of the others, and the background."""
    things = [thing for place in PLACES for thing in _inside(scene, place)]
    named = [f"a {thing.color} {thing.kind}" if isinstance(thing, Shape) else "a sign" for thing in things]
    named, others = named[:SHORT_NAMES], len(named) - SHORT_NAMES
    if others > 0:
        named.append(f"{NUMBERS[others]} more {'thing' if others == 1 else 'things'}")
    return f"{_join(named)} on a {scene.background} background ."


def question(scene: Scene, task: str, rng: random.Random) -> tuple[str, str] | None:
    """(question, answer) of a task. None if the scene does not allow the question that was drawn."""
    if not scene.shapes and task not in ("text", "bg"):
        return None
    if task in _ASK:
        return _ASK[task](scene, rng)
    return shape_question(scene, task, rng)  # pyright: ignore[reportArgumentType] it reads shapes and background alone


def questions(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """One question of every task that the scene allows, as dicts of task, question and answer."""
    asked = [(task, question(scene, task, rng)) for task in TASKS]
    return [{"task": task, "question": pair[0], "answer": pair[1]} for task, pair in asked if pair]


def place_of(thing: Thing, scene: Scene) -> tuple[str, str]:
    """The words for the third of the picture, by row and by column, in which the thing's centre lies."""
    return ROWS[min(2, int(3 * thing.y / scene.height))], COLUMNS[min(2, int(3 * thing.x / scene.width))]


def neighbour(thing: Thing, scene: Scene) -> Thing | None:
    """The other thing whose centre is nearest; of equals the one that is told first."""
    others = [other for place in PLACES for other in _inside(scene, place) if other is not thing]
    return min(others, key=lambda other: (other.x - thing.x) ** 2 + (other.y - thing.y) ** 2, default=None)


def form_of(scene: Scene) -> str:
    if 4 * scene.width >= 5 * scene.height:
        return "wide"
    return "tall" if 4 * scene.height >= 5 * scene.width else "square"


def words() -> list[str]:
    """The closed vocabulary, in the order of the tokenizer's ids."""
    world = [*COLORS, *KINDS, *RADII, *BACKGROUNDS, *TEXTURES, *SIGNS, *NUMBERS, *ROWS, *COLUMNS, *FORMS, ":"]
    return list(dict.fromkeys([*_FRAME_WORDS.split(), *world]))


def _inside(scene: Scene, place: tuple[str, str]) -> list[Thing]:
    """The things of a place, from left to right, then from top to bottom."""
    return sorted((t for t in scene.things if place_of(t, scene) == place), key=lambda thing: (thing.x, thing.y))


def _told(thing: Thing, scene: Scene, with_neighbour: bool) -> str:
    other = neighbour(thing, scene) if with_neighbour else None
    if other is None:
        return thing.phrase
    return f"{thing.phrase} near the {'sign' if isinstance(other, Sign) else f'{other.color} {other.kind}'}"


def _opening(scene: Scene) -> str:
    number = len(scene.things)
    return f"a {form_of(scene)} picture of {NUMBERS[number]} {'thing' if number == 1 else 'things'}"


def _ground(scene: Scene) -> str:
    return f"on a {scene.background} {scene.texture} background"


def _totals(scene: Scene) -> str:
    counts = [sum(shape.size == size for shape in scene.shapes) for size in RADII]
    told = [f"{NUMBERS[n]} {size} {'shape' if n == 1 else 'shapes'}" for n, size in zip(counts, RADII, strict=True)]
    return f"in all there are {_join([*told, 'one sign' if scene.sign else 'no sign'])} ."


def _join(parts: Sequence[str]) -> str:
    *head, last = parts
    return f"{' , '.join(head)} and {last}" if head else last


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.shapes)
    return f"where is the {shape.color} {shape.kind} ?", " ".join(place_of(shape, scene))


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.4:
        return "how many shapes are there ?", NUMBERS[len(scene.shapes)]
    if draw < 0.7:
        size = rng.choice(list(RADII))
        return f"how many {size} shapes are there ?", NUMBERS[sum(shape.size == size for shape in scene.shapes)]
    color = rng.choice([rng.choice(scene.shapes).color, rng.choice(list(COLORS))])
    return f"how many {color} shapes are there ?", NUMBERS[sum(shape.color == color for shape in scene.shapes)]


def _ask_sign(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return ("what does the sign say ?", scene.sign.word) if scene.sign else None


_ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "where": _ask_where,
    "count": _ask_count,
    "text": _ask_sign,
}
