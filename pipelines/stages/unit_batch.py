"""What travels through the dataflow: one Ray Data row holds one work unit, from the first stage to the last.

Metadata goes as one JSON string, so that Arrow never has to guess types; pixels and visual tokens go as arrays. Inside
a stage every value is a dataclass of this module.
"""

import itertools
import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.output.unit import Unit
from pipelines.text import clean


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt. The fields are columns of the output (`output/schema.py`)."""

    caption: str
    num_kept_tokens: int
    num_prompt_tokens: int
    num_generated_tokens: int
    finish_reason: str  # stop | length


@dataclass(frozen=True, slots=True)
class Sample:
    """What the report shows of a sampled image: `kept` are indices among the `num_tokens` tokens of its first picture.

    -1 stands for a token of no one place in the picture.
    """

    jpeg: str  # thumbnail, base64
    kept: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a benchmark: what the predictions say of it beside its answer (`accuracy/schema.py`)."""

    benchmark: str
    question_id: str
    group_id: str
    image_id: str
    question: str
    hint: str | None
    choices: list[str]
    answers: list[str]  # the references
    category: str
    kind: str
    prompt: str
    source: str
    row: int
    max_new_tokens: int  # the benchmark's limit; no column


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """What benchmarks ask about an image: one question for each of its prompts, in their order.

    Each question is about all `num_pictures` pictures of the image.
    """

    questions: list[Question]
    num_pictures: int = 1


@dataclass(frozen=True, slots=True)
class CanaryCopy:
    """Which of the canary's copies an image is (`preflight/canary_stages.py`); indices count the images as read."""

    variant: str  # true | blank | swapped
    index: int  # of the image that was copied
    partner: int | None = None  # index of the image whose pixels a swapped copy shows


@dataclass(slots=True)
class Image:
    """One image of a unit that is still fit to be captioned.

    The reader sets what identifies the image. The stage that turns pixels into visual tokens sets `num_visual_tokens`
    and, of a sampled image, `sample`. The generator sets `answers`, one for each prompt.
    """

    id: str
    source: str
    row: int
    sha256: str
    prompts: list[str]
    answers: list[Answer] = field(default_factory=list)
    num_visual_tokens: int = 0  # of all its pictures, before pruning
    sampled: bool = False
    references: list[str] = field(default_factory=list)  # of sampled images only
    sample: Sample | None = None
    question_set: QuestionSet | None = None  # of an evaluation
    canary: CanaryCopy | None = None  # of a canary run

    @property
    def questions(self) -> Sequence[Question]:
        """What each prompt asks, for its limit of new tokens and its score; empty in a caption job."""
        return self.question_set.questions if self.question_set else ()

    @property
    def num_pictures(self) -> int:
        """How many pictures each prompt is about."""
        return self.question_set.num_pictures if self.question_set else 1


@dataclass(slots=True)
class Rejected:
    """One image that leaves the dataflow for the quarantine, with a reason of the closed list in schema.py."""

    id: str
    source: str
    row: int
    sha256: str | None
    reason: str
    detail: str
    questions: list[Question] = field(default_factory=list)  # that stay without an answer


@dataclass(slots=True)
class UnitBatch:
    """A unit on its way; an `error` means that it failed as a whole.

    `arrays` hold one row for each picture of `images`, in order; with `rows_per_prompt` one for each picture of each
    prompt of each image.
    """

    unit: Unit
    images: list[Image] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    error: str | None = None
    rows_per_prompt: bool = False
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The unit as a row of Ray Data: `meta`, and the arrays themselves, which are not copied."""
        meta = _fields(self)
        del meta["arrays"]
        return {"meta": json.dumps(meta, default=_fields), **self.arrays}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "UnitBatch":
        """The unit that `to_row` wrote; the arrays are the row's own."""
        meta = json.loads(row["meta"])
        meta["unit"]["sources"] = tuple(meta["unit"]["sources"])
        meta["unit"] = Unit(**meta["unit"])
        meta["images"] = [_image(**image) for image in meta["images"]]
        meta["rejected"] = [_rejected(**image) for image in meta["rejected"]]
        return cls(**meta, arrays={name: value for name, value in row.items() if name != "meta"})

    def reject(self, index: int, reason: str, detail: str) -> None:
        """Notes image `index` for the quarantine; `drop` takes it out."""
        image = self.images[index]
        where = (image.id, image.source, image.row, image.sha256)
        self.rejected.append(Rejected(*where, reason, clean(detail), list(image.questions)))

    def drop(self, indices: Collection[int]) -> None:
        """Takes the images at `indices` out. The caller has taken the arrays out before: their rows would not fit."""
        assert not self.arrays, f"arrays must be taken out before images are dropped, got {sorted(self.arrays)}"
        self.images = [image for i, image in enumerate(self.images) if i not in indices]

    def rows(self) -> list[range]:
        """Each image's rows of the arrays."""
        prompts = [len(image.prompts) if self.rows_per_prompt else 1 for image in self.images]
        counts = [image.num_pictures * number for image, number in zip(self.images, prompts, strict=True)]
        return [range(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall seconds of the block to the stage's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass with slots, not copied: `dataclasses.asdict` would copy all that they hold."""
    return {name: getattr(value, name) for name in value.__slots__}


def _image(
    *,
    answers: list[dict[str, Any]],
    sample: dict[str, Any] | None,
    question_set: dict[str, Any] | None,
    canary: dict[str, Any] | None,
    **plain: Any,
) -> Image:
    return Image(
        **plain,
        answers=[Answer(**answer) for answer in answers],
        sample=Sample(**sample) if sample else None,
        question_set=_question_set(**question_set) if question_set else None,
        canary=CanaryCopy(**canary) if canary else None,
    )


def _question_set(*, questions: list[dict[str, Any]], num_pictures: int) -> QuestionSet:
    return QuestionSet([Question(**question) for question in questions], num_pictures)


def _rejected(*, questions: list[dict[str, Any]], **plain: Any) -> Rejected:
    return Rejected(**plain, questions=[Question(**question) for question in questions])
