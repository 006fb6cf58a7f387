"""The last stage, a CPU task: commits the result of a unit exactly once.

The stage writes the quarantine part first. Then it writes the part of captions (in an evaluation, of predictions),
which commits the unit. The name of a part is a pure function of file, row range and configuration, and a part appears
as a whole or not at all. So a unit that is written twice is still one part. The stage returns `summary`, one JSON
string for each unit, which streams to the driver.
"""

import json
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from pipelines.corpus.fault import NOT_SHARED, OUTAGE, OutageError
from pipelines.output.parts import encode_table
from pipelines.output.reader import QUARANTINE_FOLDER, DamagedPart, OutputReader
from pipelines.output.redo import merge
from pipelines.output.schema import CAPTIONS, CAPTIONS_FOLDER, QUARANTINE, REASONS
from pipelines.output.totals import Totals
from pipelines.output.unit import Unit
from pipelines.secrets import without_secrets
from pipelines.stages.unit_batch import Image, Rejected, Sample, UnitBatch
from pipelines.store import Store
from pipelines.text import clean


class Sink:
    """Writes the parts of units. `rows` makes the rows of a unit's part, in the columns of `schema`."""

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
        self.witness: str | None = None  # an object that the driver has written; who sees none writes elsewhere

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch = UnitBatch.from_row(row)
        if unit_batch.error is None and self.witness is not None and not self.store.exists(self.witness):
            unit_batch.error = (
                f"{NOT_SHARED}output.path must be a folder that the driver and all workers share, or an object store; "
                f"got {self.store.path}, and the worker on {socket.gethostname()} sees nothing of the driver there"
            )
        if unit_batch.error is None:
            try:
                self.commit(unit_batch)
            except OutageError as error:  # the store refused until patience was over: the driver stops the run
                unit_batch.error = f"{OUTAGE}{error}"
            except Exception as error:  # nothing is committed, and the summary tells the driver
                unit_batch.error = f"write: {type(error).__name__}: {clean(str(error))}"
        return {"summary": json.dumps(summarize(unit_batch))}

    def commit(self, unit_batch: UnitBatch) -> None:
        """Writes the unit's quarantine part, if any image is rejected, and then the part that commits the unit.

        Of a committed unit of which some rows were tried again, the captions are written first (`output/redo.py`).
        """
        with unit_batch.timed("write"):
            self._put(unit_batch.unit, self.objects(unit_batch))

    def at(self, store: Store) -> "Sink":
        """The same sink with its output in another store, which needs no witness."""
        sink = copy(self)
        sink.store, sink.witness = store, None
        return sink

    def join(self, unit: Unit, pieces: Sequence[Unit], aside: "Sink") -> dict[str, Any]:
        """Commits a unit from the parts of its pieces, which `aside` has committed in order. Returns its summary.

        Raises:
            OSError: if a part cannot be read, or the unit's cannot be written.
        """
        rows, rejected, sums = [], [], Totals()
        for part in OutputReader(aside.store, self.folder).parts(None, None, [piece.part for piece in pieces]):
            if isinstance(part, DamagedPart):
                raise OSError(str(part))
            rows += part.rows.to_pylist()
            rejected += [] if part.quarantine is None else part.quarantine.to_pylist()
            sums.add(part.totals)
        of_unit = {name: value for name, value in sums.to_dict().items() if name != "units"}
        self._put(unit, self._encode(unit, rows, rejected, of_unit))
        return {"unit": unit.name, "error": None, **of_unit, "samples": []}

    def _put(self, unit: Unit, objects: dict[str, bytes]) -> None:
        """Writes the objects of a unit, and removes the quarantine of an earlier try if there is none now."""
        quarantine = f"{QUARANTINE_FOLDER}/{unit.part}"
        if unit.redo:
            objects = dict(reversed(objects.items()))
        elif quarantine not in objects:  # an earlier try may have rejected images, and died before its commit
            self.store.delete(quarantine)
        for name, content in objects.items():
            self.store.write(name, content)
        if unit.redo and quarantine not in objects:
            self.store.delete(quarantine)

    def objects(self, unit_batch: UnitBatch) -> dict[str, bytes]:
        """Content of each part of the unit by its path in the output. The part that commits the unit comes last."""
        unit = unit_batch.unit
        rejected = [
            {**_identity(r), "stage": REASONS[r.reason], "reason": r.reason, "detail": without_secrets(r.detail)}
            for r in unit_batch.rejected
        ]
        rows, sums = self.rows(unit_batch, **self.names), totals(unit_batch)
        if unit.redo:

            def totals_of(captioned: set[tuple[str, int]]) -> dict[str, Any]:
                images = [image for image in unit_batch.images if (image.source, image.row) in captioned]
                return totals(replace(unit_batch, images=images))

            rows, rejected, sums = merge(unit, rows, rejected, totals_of, self.store)
        return self._encode(unit, rows, rejected, sums)

    def _encode(
        self, unit: Unit, rows: list[dict[str, Any]], rejected: list[dict[str, Any]], sums: dict[str, Any]
    ) -> dict[str, bytes]:
        objects = {}
        if rejected:
            objects[f"{QUARANTINE_FOLDER}/{unit.part}"] = encode_table(rejected, QUARANTINE, {})
        metadata = {**sums, "unit": unit.name, "fingerprint": self.fingerprint, "sources": unit.sources}
        return objects | {f"{self.folder}/{unit.part}": encode_table(rows, self.schema, metadata)}


def caption_rows(unit_batch: UnitBatch, *, model: str, method: str) -> list[dict[str, Any]]:
    """One row for each caption, in the columns of `CAPTIONS`."""
    names = {"model": model, "method": method}
    return [
        {**_identity(image), **asdict(answer), **names, "prompt": prompt, "num_visual_tokens": image.num_visual_tokens}
        for image in unit_batch.images
        for prompt, answer in zip(image.prompts, image.answers, strict=True)
    ]


def totals(unit_batch: UnitBatch) -> dict[str, Any]:
    """The numbers that a unit adds to a run's totals. They are stored in its part, so that they outlive the driver."""
    answers = [answer for image in unit_batch.images for answer in image.answers]
    return {
        "images_captioned": len(unit_batch.images),
        "images_quarantined": len(unit_batch.rejected),
        "captions": len(answers),
        "unanswered": sum(len(rejected.questions) for rejected in unit_batch.rejected),
        "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
        "generated_tokens": sum(answer.num_generated_tokens for answer in answers),
        "finished_by_length": sum(answer.finish_reason == "length" for answer in answers),
        "crop_tokens": dict(sum((Counter(image.crop_tokens) for image in unit_batch.images), Counter())),
        "finished_by_loop": sum(answer.finish_reason == "loop" for answer in answers),
        "retried": sum(answer.num_attempts > 1 for answer in answers),
        "repaired": sum(answer.num_attempts > 1 and answer.finish_reason == "stop" for answer in answers),
        "retry_tokens": sum(answer.num_discarded_tokens for answer in answers),
        "reasons": dict(Counter(rejected.reason for rejected in unit_batch.rejected)),
        "seconds": unit_batch.seconds,
    }


def summarize(unit_batch: UnitBatch) -> dict[str, Any]:
    """A unit's message to the driver: its error, or its totals and its sampled images."""
    summary: dict[str, Any] = {"unit": unit_batch.unit.name, "error": unit_batch.error}
    if unit_batch.unit.redo:
        summary["redone"] = True  # the totals are of the rows that were tried again
    if unit_batch.error is None:
        samples = [_sample_fields(image, image.sample) for image in unit_batch.images if image.sample is not None]
        summary |= totals(unit_batch) | {"samples": samples}
    return summary


def _sample_fields(image: Image, sample: Sample) -> dict[str, Any]:
    """A sampled image for the report, the gate and samples.json."""
    return {
        "id": image.id,
        "source": image.source,
        "row": image.row,
        "references": image.references,
        "captions": [asdict(answer) for answer in image.answers],
        "prompts": image.prompts,
        **asdict(sample),
    }


def _identity(image: Image | Rejected) -> dict[str, Any]:
    """The columns that identify an image in every part."""
    return {"id": image.id, "source": image.source, "row": image.row, "sha256": image.sha256}
