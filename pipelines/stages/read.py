"""First stage, a CPU task: a span of units -> one row per unit with decoded pixels.

Adds `meta` and `pixels` (uint8 [n, H, H, 3], images fit to be captioned; LLaVA-1.6's crops: `stack_pictures`). An
image that cannot be read is rejected here; a file that cannot be read fails its unit.
"""

import hashlib
import itertools
import string
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipelines.corpus.columns import Columns
from pipelines.corpus.fetch import fetch
from pipelines.corpus.format import Format, Record
from pipelines.images.decode import Reject, decode_image
from pipelines.images.tiles import Tiles, stack_pictures
from pipelines.output.span import SpanRow
from pipelines.stages.unit_batch import Image, Rejected, UnitBatch
from pipelines.store import Store
from pipelines.text import clean


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """Arguments of `decode_image`; `size`, `background` and `resolutions` come from the checkpoint."""

    size: int
    aspect: str
    background: tuple[int, int, int]
    max_bytes: int
    max_pixels: int
    min_side: int
    resolutions: tuple[tuple[int, int], ...] = ()  # of LLaVA-1.6


class Reader(Protocol):
    """The first stage, of whatever kind of job."""

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A row for each unit of the span in `row`, images decoded."""
        ...

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """What a `Rejected` says of the only image of a span, without decoding it."""
        ...


class ReadDecode:
    """Reads the images of a span and decodes them, one unit at a time; memory holds one unit and one read batch."""

    def __init__(
        self,
        *,
        store: Store,
        format: Format,
        columns: Columns | None,
        templates: list[str],
        decode: DecodeSettings,
        fetch_threads: int,
        fetch_timeout: float,
    ):
        self.store, self.format, self.columns = store, format, columns
        self.templates, self.decode = templates, decode
        self.fetch_threads, self.fetch_timeout = fetch_threads, fetch_timeout

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        span = SpanRow.from_row(row)
        records = self._records(span)
        yield from fill_units(
            span,
            lambda unit_batch: self._fill(
                unit_batch, records, span.num_samples if unit_batch.unit == span.units[0] else 0
            ),
        )

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """id, source, row and sha256 of the only image of a span, without decoding it."""
        [record] = self._fetch([next(self._records(span))])
        return _where(record)

    def _fill(self, unit_batch: UnitBatch, records: Iterator[Record], num_samples: int) -> None:
        with unit_batch.timed("read"):
            rows = self._fetch(list(itertools.islice(records, unit_batch.unit.num_images)))
        if len(rows) != unit_batch.unit.num_images:
            raise ValueError(f"expected {unit_batch.unit.num_images} rows in {unit_batch.unit.name}, got {len(rows)}")
        pixels: list[np.ndarray | Tiles] = []
        with unit_batch.timed("decode"):
            for record in rows:
                where = _where(record)
                try:
                    if isinstance(record.data, Reject):
                        raise record.data
                    assert not isinstance(record.data, str)  # fetched above
                    prompts = [fill_template(template, record.fields) for template in self.templates]
                    pixels.append(decode_image(record.data, **asdict(self.decode)))
                    unit_batch.images.append(Image(**where, prompts=prompts))
                except Reject as reject:
                    unit_batch.rejected.append(Rejected(**where, reason=reject.reason, detail=clean(reject.detail)))
                    continue
                if len(unit_batch.images) <= num_samples:
                    unit_batch.images[-1].sampled = True
                    unit_batch.images[-1].references = record.references
            unit_batch.arrays = stack_pictures(pixels, self.decode.size)

    def _fetch(self, records: list[Record]) -> list[Record]:
        """The records with the bytes that their URIs name, several fetched at a time."""
        uris = [record.data for record in records if isinstance(record.data, str)]
        if not uris:
            return records
        with ThreadPoolExecutor(self.fetch_threads) as pool:
            got = pool.map(lambda uri: fetch(uri, self.store, self.decode.max_bytes, self.fetch_timeout), uris)
            return [replace(each, data=next(got)) if isinstance(each.data, str) else each for each in records]

    def _records(self, span: SpanRow) -> Iterator[Record]:
        return self.format.records(
            self.store,
            span.rows,
            self.columns,
            max_bytes=self.decode.max_bytes,
            with_references=span.num_samples > 0,
        )


def _where(record: Record) -> dict[str, Any]:
    """What an `Image` and a `Rejected` say alike of their row."""
    sha256 = hashlib.sha256(record.data).hexdigest() if isinstance(record.data, bytes) else None
    return {"id": record.id, "source": record.source, "row": record.row, "sha256": sha256}


def fill_units(span: SpanRow, fill: Callable[[UnitBatch], None]) -> Iterator[dict[str, Any]]:
    """A row for each unit of the span, filled in order; what cannot be filled is a unit with an error."""
    for unit in span.units:
        unit_batch = UnitBatch(unit)
        try:
            fill(unit_batch)
        except Exception as error:  # an unreadable file or store fails its units; the driver decides what then
            unit_batch = UnitBatch(unit, error=f"read: {type(error).__name__}: {clean(str(error))}")
        yield unit_batch.to_row()


def fill_template(template: str, fields: dict[str, Any]) -> str:
    """The template with the row's columns in its braces.

    Raises:
        Reject: reason `prompt`, if a column is null.
    """
    if missing := [name for name, value in fields.items() if value is None]:
        raise Reject("prompt", f"column {missing[0]} is null")
    parts = ((text, name) for text, name, _, _ in string.Formatter().parse(template))
    return "".join(text + ("" if name is None else str(fields[name])) for text, name in parts)
