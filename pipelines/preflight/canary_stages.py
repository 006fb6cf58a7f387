"""The first and the last stage of the canary (`canary.py`): they triple every image and collect all its captions.

The tasks of these stages import this module. In `canary.py` they would also load torch and the code of all models.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.output.span import SpanRow
from pipelines.stages.read import Reader
from pipelines.stages.unit_batch import CanaryCopy, Image, UnitBatch

VARIANTS = ("true", "blank", "swapped")


class ReadThreefold:
    """A reader that passes every image on three times: as it is, blank, and with the pixels of another image.

    Args:
        read: the reader of the job.
        blank: RGB of the blank image.
    """

    def __init__(self, read: Reader, blank: tuple[int, int, int]):
        self.read, self.blank = read, blank

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for filled in self.read(row):
            unit_batch = UnitBatch.from_row(filled)
            if unit_batch.error is None:
                self._triple(unit_batch)
            yield unit_batch.to_row()

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """As of the reader of the job."""
        return self.read.identify(span)

    def _triple(self, unit_batch: UnitBatch) -> None:
        """Replaces the images that have a partner by three copies: first all true, then all blank, then all swapped.

        A swapped image takes the sha256 of the image whose pixels it shows, because the sha256 seeds random selection.
        Images without a partner are dropped.
        """
        images = unit_batch.images
        pairs = [(i, j) for i, j in enumerate(partners([image.sha256 for image in images])) if j is not None]
        chosen, partner_rows = [i for i, _ in pairs], [j for _, j in pairs]
        unit_batch.images = [
            *(replace(images[i], canary=CanaryCopy("true", i)) for i in chosen),
            *(replace(images[i], canary=CanaryCopy("blank", i)) for i in chosen),
            *(
                replace(images[i], canary=CanaryCopy("swapped", i, j), sha256=images[j].sha256, sizes=images[j].sizes)
                for i, j in pairs
            ),
        ]
        pixels = unit_batch.arrays["pixels"].take([*chosen, *chosen, *partner_rows])
        for row in pixels.rows()[len(chosen) : 2 * len(chosen)]:
            row.reshape(-1, 3)[:] = self.blank
        unit_batch.arrays = {"pixels": pixels}


def partners(hashes: list[str]) -> list[int | None]:
    """For each image the index of the next image with another hash, cyclically; None if all hashes are equal."""
    count = len(hashes)
    return [
        next((j % count for j in range(i + 1, i + count) if hashes[j % count] != hashes[i]), None) for i in range(count)
    ]


def collect(row: dict[str, Any]) -> dict[str, Any]:
    """The last stage: commits nothing, and sends the captions of every copy to the driver.

    `captions` holds one record for each copy and prompt. Its `partner` is the index of the image whose caption a
    swapped copy should have; None if the copy is not swapped, or if the prompts of the unit's images differ.
    """
    unit_batch = UnitBatch.from_row(row)
    is_comparable = _same_prompts(unit_batch.images)
    captions = [
        {
            "variant": image.canary.variant,
            "image": image.canary.index,
            "partner": image.canary.partner if is_comparable else None,
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
