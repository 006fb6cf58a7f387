"""The batch of images of a unit, which travels from stage to stage as one Ray Data row.

In a row, the metadata are one JSON string, so that Arrow never has to guess types; pixels and visual tokens are ragged
arrays, each in two columns: its values, and the lengths of its rows.
Inside a stage, every value is a dataclass of this module.
"""

import itertools
import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from otprune.families import Geometry, Size
from pipelines.output.unit import Unit
from pipelines.stages.ragged import Ragged
from pipelines.text import clean

LENGTHS = ".lengths"  # ends the name of the column with the lengths of an array


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one prompt. The fields are columns of the output (`output/schema.py`)."""

    caption: str
    num_kept_tokens: int
    num_prompt_tokens: int
    num_generated_tokens: int
    finish_reason: str  # stop | length


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled image as the report shows it, by its first picture."""

    jpeg: str  # thumbnail, base64
    width: int  # of the thumbnail, in pixels
    height: int
    kept: list[int]  # of the tokens on the grid, the indices of those kept; -1: a token that belongs to no single place
    rows: int  # of the grid of tokens that covers the picture; 0: the tokens form none
    columns: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a benchmark. All fields but the limit are columns of the predictions (`accuracy/schema.py`)."""

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
    max_new_tokens: int  # the benchmark's limit, which is not a column


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions that benchmarks ask about an image: one for each prompt of the image, in the same order.

    Each question is about all `num_pictures` pictures of the image.
    """

    questions: list[Question]
    num_pictures: int = 1


@dataclass(frozen=True, slots=True)
class CanaryCopy:
    """Marks an image as one of the canary's copies of an image (`preflight/canary_stages.py`)."""

    variant: str  # true | blank | swapped
    index: int  # index, among the images as read, of the image that was copied
    partner: int | None = None  # index of the image whose pixels a swapped copy shows


@dataclass(slots=True)
class Image:
    """One image of a unit that is still fit to be captioned.

    The reader sets what identifies the image, and the sizes of its pictures. The stage that turns pixels into visual
    tokens sets `num_visual_tokens` and, of a sampled image, `sample`. The generator sets `answers`, one a prompt.
    """

    id: str
    source: str
    row: int
    sha256: str
    prompts: list[str]
    sizes: list[Size] = field(default_factory=list)  # (height, width) of each of its pictures, upright, in pixels
    answers: list[Answer] = field(default_factory=list)
    num_visual_tokens: int = 0  # of all its pictures, before pruning
    sampled: bool = False  # whether the report shows the image
    references: list[str] = field(default_factory=list)  # of sampled images only
    sample: Sample | None = None
    question_set: QuestionSet | None = None  # only in an evaluation
    canary: CanaryCopy | None = None  # only in a canary run

    @property
    def questions(self) -> Sequence[Question]:
        """The question of each prompt. Empty in a caption job."""
        return self.question_set.questions if self.question_set else ()

    @property
    def num_pictures(self) -> int:
        """Number of pictures that each prompt is about."""
        return self.question_set.num_pictures if self.question_set else 1


@dataclass(slots=True)
class Rejected:
    """One image that leaves the dataflow for the quarantine. `reason` is a key of `output.schema.REASONS`."""

    id: str
    source: str
    row: int
    sha256: str | None
    reason: str
    detail: str
    questions: list[Question] = field(default_factory=list)  # about the image, which stay without an answer


@dataclass(slots=True)
class UnitBatch:
    """A unit with its images between two stages.

    Each of `arrays` holds one row for each picture of each image, in order; with `rows_per_prompt`, one row for each
    picture of each prompt of each image.
    """

    unit: Unit
    images: list[Image] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    error: str | None = None  # set if the unit failed as a whole
    rows_per_prompt: bool = False
    arrays: dict[str, Ragged] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The unit as a Ray Data row: `meta`, and the arrays themselves, which are not copied."""
        meta = _fields(self)
        del meta["arrays"]
        values = {name: array.values for name, array in self.arrays.items()}
        lengths = {name + LENGTHS: array.lengths for name, array in self.arrays.items()}
        return {"meta": json.dumps(meta, default=_fields), **values, **lengths}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "UnitBatch":
        """The unit that `to_row` wrote. Its arrays are those of the row, not copies."""
        meta = json.loads(row["meta"])
        lists = {name: tuple(meta["unit"][name]) for name in ("sources", "redo")}
        meta["unit"] = Unit(**{**meta["unit"], **lists})
        meta["images"] = [_image(**image) for image in meta["images"]]
        meta["rejected"] = [_rejected(**image) for image in meta["rejected"]]
        names = [name.removesuffix(LENGTHS) for name in row if name.endswith(LENGTHS)]
        return cls(**meta, arrays={name: Ragged(row[name], row[name + LENGTHS]) for name in names})

    def reject(self, index: int, reason: str, detail: str) -> None:
        """Adds image `index` to `rejected`. The image stays in `images`, and indices stay valid, until `drop`."""
        image = self.images[index]
        identity = (image.id, image.source, image.row, image.sha256)
        self.rejected.append(Rejected(*identity, reason, clean(detail), list(image.questions)))

    def drop(self, indices: Collection[int]) -> None:
        """Removes the images at `indices`. The caller must remove the arrays first: their rows would not fit."""
        assert not self.arrays, f"arrays must be taken out before images are dropped, got {sorted(self.arrays)}"
        self.images = [image for i, image in enumerate(self.images) if i not in indices]

    def rows(self) -> list[range]:
        """For each image, the range of its rows in the arrays."""
        repeats = [len(image.prompts) if self.rows_per_prompt else 1 for image in self.images]
        counts = [image.num_pictures * repeat for image, repeat in zip(self.images, repeats, strict=True)]
        return [range(end - count, end) for end, count in zip(itertools.accumulate(counts), counts, strict=True)]

    def frames(self, geometry: Geometry) -> list[np.ndarray]:
        """The frame of each picture of each image, in order: views of the array `pixels`."""
        sizes = [size for image in self.images for size in image.sizes]
        pairs = zip(self.arrays["pixels"].rows(), sizes, strict=True)
        return [flat.reshape(geometry.frame(size).shape) for flat, size in pairs]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the block to the seconds of `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass with slots, by name. `dataclasses.asdict` would copy every value, arrays too."""
    return {name: getattr(value, name) for name in value.__slots__}


def _image(
    *,
    sizes: list[list[int]],
    answers: list[dict[str, Any]],
    sample: dict[str, Any] | None,
    question_set: dict[str, Any] | None,
    canary: dict[str, Any] | None,
    **plain: Any,
) -> Image:
    """The image whose fields stand in the JSON of a row."""
    return Image(
        **plain,
        sizes=[(height, width) for height, width in sizes],
        answers=[Answer(**answer) for answer in answers],
        sample=Sample(**sample) if sample else None,
        question_set=_question_set(**question_set) if question_set else None,
        canary=CanaryCopy(**canary) if canary else None,
    )


def _question_set(*, questions: list[dict[str, Any]], num_pictures: int) -> QuestionSet:
    return QuestionSet([Question(**question) for question in questions], num_pictures)


def _rejected(*, questions: list[dict[str, Any]], **plain: Any) -> Rejected:
    return Rejected(**plain, questions=[Question(**question) for question in questions])
