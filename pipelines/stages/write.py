"""Last stage, a CPU task: writes what a unit came to, exactly once.

The quarantine object goes first, then the captions object (of benchmarks: the predictions), which commits the unit: its
name is a pure function of file, row range and configuration, and it appears as a whole or not at all. A unit written
twice is one object.
Returns `summary`, one JSON string a unit, which streams to the driver.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipelines.output.parts import encode_table
from pipelines.output.schema import CAPTIONS, CAPTIONS_FOLDER, QUARANTINE, REASONS
from pipelines.stages.unit_batch import Image, Rejected, Sample, UnitBatch
from pipelines.store import Store
from pipelines.text import clean


class Sink:
    """Writes units; holds nothing but names. `rows` says what a unit came to, in the columns of `schema`."""

    def __init__(
        self,
        *,
        store: Store,
        fingerprint: str,
        model: str,
        method: str,
        folder: str = CAPTIONS_FOLDER,
        schema: pa.Schema = CAPTIONS,
        rows: Callable[..., list[dict[str, Any]]] | None = None,
    ):
        self.store, self.fingerprint, self.folder, self.schema = store, fingerprint, folder, schema
        self.rows, self.names = rows or caption_rows, {"model": model, "method": method}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch = UnitBatch.from_row(row)
        if unit_batch.error is None:
            try:
                self.commit(unit_batch)
            except Exception as error:  # a store that refuses: nothing is committed, and the driver is told
                unit_batch.error = f"write: {type(error).__name__}: {clean(str(error))}"
        return {"summary": json.dumps(summarize(unit_batch))}

    def commit(self, unit_batch: UnitBatch) -> None:
        """Writes quarantine (if any), then what commits the unit."""
        with unit_batch.timed("write"):
            objects = self.objects(unit_batch)
            if not unit_batch.rejected:  # an earlier try may have rejected images, say for a time-out, and then died
                self.store.delete(f"quarantine/{unit_batch.unit.part}")
            for name, content in objects.items():
                self.store.write(name, content)

    def objects(self, unit_batch: UnitBatch) -> dict[str, bytes]:
        """Name -> content of what the unit came to; the object that commits it comes last."""
        objects, name = {}, unit_batch.unit.part
        if unit_batch.rejected:
            rows = [
                {**_where(r), "stage": REASONS[r.reason], "reason": r.reason, "detail": r.detail}
                for r in unit_batch.rejected
            ]
            objects[f"quarantine/{name}"] = encode_table(rows, QUARANTINE, {})
        metadata = {
            **totals(unit_batch),
            "unit": unit_batch.unit.name,
            "fingerprint": self.fingerprint,
            "sources": unit_batch.unit.sources,
        }
        rows = self.rows(unit_batch, **self.names)
        return objects | {f"{self.folder}/{name}": encode_table(rows, self.schema, metadata)}


def caption_rows(unit_batch: UnitBatch, *, model: str, method: str) -> list[dict[str, Any]]:
    """One row for each caption, in the columns of `CAPTIONS`."""
    names = {"model": model, "method": method}
    return [
        {**_where(image), **asdict(answer), **names, "prompt": prompt, "num_visual_tokens": image.num_visual_tokens}
        for image in unit_batch.images
        for prompt, answer in zip(image.prompts, image.answers, strict=True)
    ]


def totals(unit_batch: UnitBatch) -> dict[str, Any]:
    """What a unit adds to the run's totals; stored with its output, so that totals survive the driver."""
    answers = [answer for image in unit_batch.images for answer in image.answers]
    return {
        "images_captioned": len(unit_batch.images),
        "images_quarantined": len(unit_batch.rejected),
        "captions": len(answers),
        "unanswered": sum(len(rejected.questions) for rejected in unit_batch.rejected),
        "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
        "generated_tokens": sum(answer.num_generated_tokens for answer in answers),
        "finished_by_length": sum(answer.finish_reason == "length" for answer in answers),
        "reasons": dict(Counter(rejected.reason for rejected in unit_batch.rejected)),
        "seconds": unit_batch.seconds,
    }


def summarize(unit_batch: UnitBatch) -> dict[str, Any]:
    """What the driver learns of a unit: its totals, or its error; and the sampled images."""
    summary: dict[str, Any] = {"unit": unit_batch.unit.name, "error": unit_batch.error}
    if unit_batch.error is None:
        samples = [_shown(image, image.sample) for image in unit_batch.images if image.sample is not None]
        summary |= totals(unit_batch) | {"samples": samples}
    return summary


def _shown(image: Image, sample: Sample) -> dict[str, Any]:
    """What the report, the gate and samples.json get of a sampled image."""
    return {
        "source": image.source,
        "row": image.row,
        "references": image.references,
        "captions": [asdict(answer) for answer in image.answers],
        "prompts": image.prompts,
        **asdict(sample),
    }


def _where(image: Image | Rejected) -> dict[str, Any]:
    return {"id": image.id, "source": image.source, "row": image.row, "sha256": image.sha256}
