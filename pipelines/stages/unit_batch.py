"""What travels through the dataflow: one Ray Data row holds one work unit, from the first stage to the last.

Metadata goes as one JSON string, so that Arrow never has to guess types; pixels and visual tokens go as arrays.
"""

import itertools
import json
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.output.unit import Unit
from pipelines.text import clean


@dataclass(slots=True)
class Image:
    """One image of a unit that is still fit to be captioned. `captions` has one entry per prompt once decoded.

    `num_pictures` and the two after it are of benchmarks: a question may be about several pictures, which then are one
    `Image`.
    """

    id: str
    source: str
    row: int
    sha256: str
    prompts: list[str]
    captions: list[dict[str, Any]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)  # of sampled images only
    sample: dict[str, Any] | None = None  # thumbnail and kept tokens, for the report
    num_pictures: int = 1  # rows of every array; each prompt is about all of them
    max_new_tokens: list[int] = field(default_factory=list)  # of each prompt; empty: as configured
    questions: list[dict[str, Any]] = field(default_factory=list)  # what each prompt asks, for scoring
    num_visual_tokens: int = 0  # of its pictures, where they differ from image to image; 0: as the unit says


@dataclass(slots=True)
class Rejected:
    """One image that leaves the dataflow for the quarantine, with a reason of the closed list in schema.py."""

    id: str
    source: str
    row: int
    sha256: str | None
    reason: str
    detail: str
    questions: list[dict[str, Any]] = field(default_factory=list)  # that stay without an answer


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
    num_visual_tokens: int = 0
    rows_per_prompt: bool = False
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        meta = {name: value for name, value in asdict(self).items() if name != "arrays"}
        return {"meta": json.dumps(meta), **self.arrays}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "UnitBatch":
        meta = json.loads(row["meta"])
        unit = Unit(**{**meta.pop("unit"), "sources": tuple(json.loads(row["meta"])["unit"]["sources"])})
        images = [Image(**image) for image in meta.pop("images")]
        rejected = [Rejected(**image) for image in meta.pop("rejected")]
        arrays = {name: value for name, value in row.items() if name != "meta"}
        return cls(unit=unit, images=images, rejected=rejected, arrays=arrays, **meta)

    def reject(self, index: int, reason: str, detail: str) -> None:
        """Notes image `index` for the quarantine; `drop` takes it out."""
        image = self.images[index]
        self.rejected.append(
            Rejected(image.id, image.source, image.row, image.sha256, reason, clean(detail), image.questions)
        )

    def drop(self, indices: Collection[int]) -> None:
        """Takes the images at `indices` out, with their rows of every array."""
        kept = [row for i, rows in enumerate(self.rows()) if i not in indices for row in rows]
        self.images = [image for i, image in enumerate(self.images) if i not in indices]
        self.arrays = {name: array[kept] for name, array in self.arrays.items()}

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
