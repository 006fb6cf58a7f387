"""The demo worlds' own benchmarks, one for each task of a corpus, scored by the code of the published benchmarks.

A row of the corpus holds an image with its references and its questions, and each benchmark takes its own questions
from the row. Rows without references or questions (photographs, broken images) belong to no benchmark. The demo models
are trained on the bare questions with a closed vocabulary, so the prompt is the question.

    demo_*      the first world: captions and eight kinds of questions
    gallery_*   the second: long captions, short ones, and the same kinds of questions
"""

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipelines.benchmarks.benchmark import Benchmark, Key, Source
from pipelines.benchmarks.captions import caption_content, caption_scorer
from pipelines.benchmarks.columns import IMAGE, TEXT, Column, image_bytes
from pipelines.benchmarks.prompts import LETTERS
from pipelines.benchmarks.rows import Content, Kind, Record, Row
from pipelines.benchmarks.scoring import Scorer, mean_scorer
from pipelines.benchmarks.short_answers import exact_match_score, short_content, yes_no_scorer, yes_or_no
from pipelines.metrics import shapes
from pipelines.metrics.chair import COUNTS, chair_counts, chair_metrics
from pipelines.metrics.choice import seed_correct
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.repetition import is_loop
from pipelines.metrics.sums import ratio

_REFERENCES = Column((pa.list_(pa.string()),), nullable=True)
_QUESTION = pa.struct([("task", pa.string()), ("question", pa.string()), ("answer", pa.string())])
_QUESTIONS = Column((pa.list_(_QUESTION),), nullable=True)
_OPTIONS = re.compile(r"(.*\?) A (.+) B (.+) C (.+) D (.+)")


def _questions_of(source: Source, task: str) -> list[dict[str, str]]:
    return [question for question in source["questions"] or [] if question["task"] == task]


def _keys_of(task: str) -> Callable[[Source, int], list[Key]]:
    def identify(source: Source, _: int) -> list[Key]:
        ids = [f"{source['id']}#{task}-{i}" for i in range(len(_questions_of(source, task)))]
        return [Key(question_id, question_id, source["id"]) for question_id in ids]

    return identify


def _short_contents_of(task: str, kind: Kind) -> Callable[[Source], list[Content]]:
    def contents(source: Source) -> list[Content]:
        return [
            content
            for question in _questions_of(source, task)
            for content in short_content(
                {"image": source["image"], "question": question["question"]},
                [yes_or_no(question["answer"]) if kind == "yesno" else question["answer"]],
                category="",
                kind=kind,
            )
        ]

    return contents


def _choice_contents(source: Source) -> list[Content]:
    contents = []
    for row in _questions_of(source, "mc"):
        match = _OPTIONS.fullmatch(row["question"])
        if match is None or row["answer"] not in LETTERS[:4]:
            raise ValueError(f"a choice must read `... ? A a B b C c D d` and have a letter as its answer, got {row}")
        question, *choices = match.groups()
        [content] = short_content({"image": source["image"], "question": question}, [row["answer"]], "", "choice")
        contents.append({**content, "choices": choices})
    return contents


def described_scorer(prefix: str = "demo", *, places: bool = False) -> Scorer:
    """The scorer of captions with what is right in them: CHAIR, and the accuracy of colours, sizes and places.

    The first reference names every shape with its colour and size, which is all that needs to be known.

    Args:
        places: whether it says the places too. Else their accuracy is left to jobs/quality.py, which reads the scenes.
    """
    base = caption_scorer(prefix)

    def statistics(groups: list[list[Record]]) -> np.ndarray:
        counts = [sum(map(_described_counts, group), np.zeros(_NUM_COUNTS)) for group in groups]
        return np.hstack([base.statistics(groups), counts])

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        scores, counts = base.combine(sums[..., :-_NUM_COUNTS]), sums[..., -_NUM_COUNTS:]
        objects, drawn = counts[..., : len(COUNTS)], counts[..., len(COUNTS) : -2]
        right = chair_metrics(objects) | shapes.shape_metrics(drawn)
        if not places:
            del right["place_accuracy"]
        right |= {name: ratio(counts[..., i], objects[..., 0]) for i, name in ((-2, "words"), (-1, "looping"))}
        return scores | {f"{prefix}_{name}": values for name, values in right.items()}

    headline = f"{prefix}_described" if places else base.headline  # n-grams tell little of a hundred words
    return Scorer(headline=headline, scale=100.0, statistics=statistics, combine=combine)


_NUM_COUNTS = len(COUNTS) + len(shapes.COUNTS) + 2


def _described_counts(record: Record) -> np.ndarray:
    """The counts of CHAIR, those of shapes, words, and 1 if the caption loops."""
    text, there = record["prediction"] or "", shapes.shapes_of_caption(record["answers"][0])
    objects = chair_counts(text, {shape.kind for shape in there}, shapes.SHAPES)
    return np.concatenate([objects, shapes.shape_counts(text, there), [len(tokenize(text)), is_loop(text)]])


def _choice_prompt(row: Row) -> str:
    options = " ".join(f"{letter} {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question']} {options}"


def _captions(name: str, column: str, prompt: str, max_new_tokens: int, scorer: Scorer) -> Benchmark:
    """Captions of the scenes, whose references are in the column."""
    several = column == "references"

    def contents(source: Source) -> list[Content]:
        return [caption_content(image_bytes(source["image"]), source[column] if several else [source[column]])]

    return Benchmark(
        name=name,
        repo="",
        files="scenes-*.parquet",
        columns={"id": TEXT, "image": IMAGE, column: _REFERENCES if several else TEXT},
        key_columns=("id", column),
        identify=lambda source, _: [Key(source["id"], source["id"], source["id"])] if source[column] else [],
        content=contents,
        prompt=lambda row: prompt,
        max_new_tokens=max_new_tokens,
        scorer=scorer,
    )


def _questions(world: str) -> tuple[Benchmark, ...]:
    """The eight tasks with questions."""
    yes_no, exact = yes_no_scorer("pope_accuracy"), mean_scorer("exact_match", exact_match_score)
    choice = mean_scorer("accuracy", lambda r: float(seed_correct(r["prediction"] or "", r["answers"][0])))
    return (
        *(_task(world, task, yes_no, kind="yesno") for task in ("exist", "rel")),
        _task(world, "mc", choice, kind="choice"),
        *(_task(world, task, exact) for task in ("attr", "where", "count", "text", "bg")),
    )


def _task(world: str, task: str, scorer: Scorer, kind: Kind = "short") -> Benchmark:
    is_choice = kind == "choice"
    return Benchmark(
        name=f"{world}_{task}",
        repo="",
        files="scenes-*.parquet",
        columns={"id": TEXT, "image": IMAGE, "questions": _QUESTIONS},
        key_columns=("id", "questions"),
        identify=_keys_of(task),
        content=_choice_contents if is_choice else _short_contents_of(task, kind),
        prompt=_choice_prompt if is_choice else lambda row: row["question"],
        max_new_tokens=8,
        scorer=scorer,
    )


DEMO = (
    _captions("demo_caption", "references", "describe the image .", 64, described_scorer()),
    *_questions("demo"),
)
GALLERY = (
    _captions(
        "gallery_long", "references", "describe the image in detail .", 192, described_scorer("gallery", places=True)
    ),
    _captions("gallery_short", "short_reference", "describe the image .", 48, caption_scorer("short")),
    *_questions("gallery"),
)
