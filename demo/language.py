"""Texts about a scene: a caption, reference captions and eight kinds of questions with answers.

The vocabulary is closed and has about 100 words. Single spaces separate all tokens, punctuation included, so a
word-level tokenizer splits a text as `str.split` does.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from demo.world import BACKGROUNDS, COLORS, DIGITS, KINDS, RADII, SIDE, Scene, Shape

CAPTION_PROMPT = "describe the image ."
TASKS = ["exist", "attr", "where", "rel", "count", "mc", "text", "bg"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
_FRAME_WORDS = (
    "USER : ASSISTANT describe the image . , and a on background with digit is there ? what color shape size where "
    "left right of above below how many shapes are yes no A B C D written none in an answer question caption this "
    "detail please object objects it picture not"
)
RELATION_GAP = 16  # pixels; nothing is asked about the relation of centres that are closer along its axis
_RELATIONS: dict[str, Callable[[Shape, Shape], float]] = {  # positive where the relation holds
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


def caption(scene: Scene) -> str:
    """The caption that the model learns: shapes from left to right, background, digit."""
    digit = f" with the digit {scene.digit.value}" if scene.digit else ""
    return f"{_list(scene.shapes)} {_on(scene)}{digit} ."


def references(scene: Scene) -> list[str]:
    """Four true captions in different words; the first is `caption`."""
    shapes = scene.shapes
    by_size = sorted(shapes, key=lambda shape: (shape.size, shape.x))
    by_height = sorted(shapes, key=lambda shape: shape.y)
    counted = f"{NUMBERS[len(shapes)]} {'shape' if len(shapes) == 1 else 'shapes'} : {_list(by_size)} {_on(scene)} ."
    if len(shapes) > 1 and shapes[1].x - shapes[0].x >= RELATION_GAP:
        last = f"{shapes[0].phrase} is left of {_list(shapes[1:])} {_on(scene)} ."
    else:
        last = f"in the picture there is {_list(shapes[::-1])} {_on(scene)} ."
    return [caption(scene), counted, f"a picture of {_list(by_height)} {_on(scene)} .", last]


def question(scene: Scene, task: str, rng: random.Random) -> tuple[str, str] | None:
    """(question, answer) of a task. None if the scene does not allow the question that was drawn."""
    return _ASK[task](scene, rng)


def questions(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """One question of every task that the scene allows, as dicts of task, question and answer."""
    asked = [(task, question(scene, task, rng)) for task in TASKS]
    return [{"task": task, "question": pair[0], "answer": pair[1]} for task, pair in asked if pair]


def position_words(x: float, y: float) -> tuple[str, str]:
    """The words for the third of the image, by row and by column, in which a point lies. x and y in pixels."""
    return ROWS[min(2, int(3 * y / SIDE))], COLUMNS[min(2, int(3 * x / SIDE))]


def words() -> list[str]:
    """The closed vocabulary, in the order of the tokenizer's ids."""
    frame = _FRAME_WORDS.split()
    world = [*COLORS, *KINDS, *RADII, *BACKGROUNDS, *DIGITS, *NUMBERS, *ROWS, *COLUMNS]
    return list(dict.fromkeys(frame + world))


def _list(shapes: Sequence[Shape]) -> str:
    *head, last = [shape.phrase for shape in shapes]
    return f"{' , '.join(head)} and {last}" if head else last


def _on(scene: Scene) -> str:
    return f"on a {scene.background} background"


def _ask_exist(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Half of the answers are yes. Of the others, six in ten share a colour or a kind with a shape of the scene."""
    if rng.random() < 0.5:
        shape = rng.choice(scene.shapes)
        return f"is there a {shape.color} {shape.kind} ?", "yes"
    present = {(shape.color, shape.kind) for shape in scene.shapes}
    while True:
        draw = rng.random()
        if draw < 0.3:
            color, kind = rng.choice(scene.shapes).color, rng.choice(KINDS)
        elif draw < 0.6:
            color, kind = rng.choice(list(COLORS)), rng.choice(scene.shapes).kind
        else:
            color, kind = rng.choice(list(COLORS)), rng.choice(KINDS)
        if (color, kind) not in present:
            return f"is there a {color} {kind} ?", "no"


def _ask_attribute(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    attribute = rng.choice(["color", "shape", "size"])
    if attribute == "size":
        shape = rng.choice(scene.shapes)
        return f"what size is the {shape.color} {shape.kind} ?", shape.size
    return _ask_color(scene, rng) if attribute == "color" else _ask_kind(scene, rng)


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shape = _choose_unique(scene.shapes, lambda shape: shape.kind, rng)
    return shape and (f"what color is the {shape.kind} ?", shape.color)


def _ask_kind(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shape = _choose_unique(scene.shapes, lambda shape: shape.color, rng)
    return shape and (f"what shape is {shape.color} ?", shape.kind)


def _choose_unique(shapes: Sequence[Shape], key: Callable[[Shape], str], rng: random.Random) -> Shape | None:
    """A random shape whose `key`, its colour or kind, no other shape has; None if there is no such shape."""
    counts = Counter(map(key, shapes))
    unique = [shape for shape in shapes if counts[key(shape)] == 1]
    return rng.choice(unique) if unique else None


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.shapes)
    return f"where is the {shape.color} {shape.kind} ?", " ".join(position_words(shape.x, shape.y))


def _ask_relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if len(scene.shapes) < 2:
        return None
    a, b = rng.sample(scene.shapes, 2)
    relation = rng.choice(list(_RELATIONS))
    lead = _RELATIONS[relation](a, b)
    if abs(lead) < RELATION_GAP:
        return None
    return f"is the {a.color} {a.kind} {relation} the {b.color} {b.kind} ?", "yes" if lead > 0 else "no"


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.6:
        return "how many shapes are there ?", NUMBERS[len(scene.shapes)]
    size = rng.choice(list(RADII))
    return f"how many {size} shapes are there ?", NUMBERS[sum(shape.size == size for shape in scene.shapes)]


def _ask_choice(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """A colour or kind question with four options; the answer is a letter."""
    ask, pool = (_ask_color, list(COLORS)) if rng.random() < 0.5 else (_ask_kind, KINDS)
    pair = ask(scene, rng)
    if pair is None:
        return None
    stem, right = pair
    options = [*rng.sample([option for option in pool if option != right], 3), right]
    rng.shuffle(options)
    listed = " ".join(f"{letter} {option}" for letter, option in zip("ABCD", options, strict=True))
    return f"{stem} {listed}", "ABCD"[options.index(right)]


def _ask_digit(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return ("what digit is written ?", scene.digit.value) if scene.digit else None


def _ask_background(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "what color is the background ?", scene.background


_ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "exist": _ask_exist,
    "attr": _ask_attribute,
    "where": _ask_where,
    "rel": _ask_relation,
    "count": _ask_count,
    "mc": _ask_choice,
    "text": _ask_digit,
    "bg": _ask_background,
}
