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
from pipelines.stages.unit_batch import Image, UnitBatch

Captions = dict[str, dict[str, str]]
"""Variant -> image and prompt -> caption."""


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
        """Names the images `variant unit row` for `collect`; the swapped have the sha256 of the pixels that they show,
        which seeds random selection."""
        images = unit_batch.images
        partner = partners([image.sha256 for image in images])
        chosen = [i for i, other in enumerate(partner) if other is not None]
        taken = [other for other in partner if other is not None]
        shown = [images[i] for i in taken]
        key = f"{unit_batch.unit.name}-{{}}".format
        unit_batch.images = [
            *(replace(images[i], id=f"true {key(i)}") for i in chosen),
            *(replace(images[i], id=f"blank {key(i)}") for i in chosen),
            *(
                replace(images[i], id=f"swapped {key(i)} {key(j)}", sha256=other.sha256)
                for i, j, other in zip(chosen, taken, shown, strict=True)
            ),
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
    """Last stage: commits nothing and tells the driver what was said of each variant."""
    unit_batch = UnitBatch.from_row(row)
    captions: Captions = {"true": {}, "blank": {}, "swapped": {}}
    others: dict[str, str] = {}
    for image in unit_batch.images:
        variant, name, *other = image.id.split(" ")
        for i, done in enumerate(image.captions):
            captions[variant][f"{name} {i}"] = done["caption"]
            if other and _same_prompts(unit_batch.images):
                others[f"{name} {i}"] = f"{other[0]} {i}"
    return {"summary": json.dumps({"error": unit_batch.error, "captions": captions, "others": others})}


def _same_prompts(images: list[Image]) -> bool:
    return all(image.prompts == images[0].prompts for image in images)
