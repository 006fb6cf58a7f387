"""The canary's first and last stage (`canary.py`): every image three times, and what was said of each.

A module of its own, since the tasks that run it import it: with `canary.py` they would load torch and all models' code.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.output.span import SpanRow
from pipelines.stages.read import Reader
from pipelines.stages.unit_batch import CanaryCopy, Image, UnitBatch

VARIANTS = ("true", "blank", "swapped")


class ReadThreefold:
    """A reader whose every image comes three times."""

    def __init__(self, read: Reader, blank: tuple[int, int, int]):
        self.read, self.blank = read, blank

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for filled in self.read(row):
            unit_batch = UnitBatch.from_row(filled)
            if unit_batch.error is None:
                self._triple(unit_batch)
            yield unit_batch.to_row()

    def identify(self, span: SpanRow) -> dict[str, Any]:
        return self.read.identify(span)

    def _triple(self, unit_batch: UnitBatch) -> None:
        """Each image that has a partner becomes three, first all true ones, then all blank, then all swapped.

        A swapped image has the sha256 of the pixels that it shows, which seeds random selection.
        """
        images = unit_batch.images
        pairs = [(i, j) for i, j in enumerate(partners([image.sha256 for image in images])) if j is not None]
        chosen, taken = [i for i, _ in pairs], [j for _, j in pairs]
        unit_batch.images = [
            *(replace(images[i], canary=CanaryCopy("true", i)) for i in chosen),
            *(replace(images[i], canary=CanaryCopy("blank", i)) for i in chosen),
            *(replace(images[i], canary=CanaryCopy("swapped", i, j), sha256=images[j].sha256) for i, j in pairs),
        ]
        rows = np.array([*chosen, *chosen, *taken], np.intp)
        unit_batch.arrays = {name: array[rows] for name, array in unit_batch.arrays.items()}
        unit_batch.arrays["pixels"][len(chosen) : 2 * len(chosen)] = self.blank


def partners(hashes: list[str]) -> list[int | None]:
    """For each image the next one of other bytes, round the corner; None where all are equal."""
    count = len(hashes)
    return [
        next((j % count for j in range(i + 1, i + count) if hashes[j % count] != hashes[i]), None) for i in range(count)
    ]


def collect(row: dict[str, Any]) -> dict[str, Any]:
    """Last stage: commits nothing and tells the driver what was said of each variant.

    `captions` holds one record for each copy and prompt; its `partner` is the index of the image whose caption a
    swapped copy should have, None where the two images were asked different things.
    """
    unit_batch = UnitBatch.from_row(row)
    comparable = _same_prompts(unit_batch.images)
    captions = [
        {
            "variant": image.canary.variant,
            "image": image.canary.index,
            "partner": image.canary.partner if comparable else None,
            "prompt": number,
            "caption": answer.caption,
        }
        for image in unit_batch.images
        if image.canary is not None
        for number, answer in enumerate(image.answers)
    ]
    return {"summary": json.dumps({"unit": unit_batch.unit.name, "error": unit_batch.error, "captions": captions})}


def _same_prompts(images: list[Image]) -> bool:
    return all(image.prompts == images[0].prompts for image in images)
