"""First stage, a CPU task: a span of units -> one row per unit with decoded pixels.

Adds `meta` and `pixels` (uint8 [n, H, H, 3], images fit to be captioned; LLaVA-1.6's crops: `stack_pictures`). An
image that cannot be read is rejected here; a file that cannot be read fails its unit.
"""

import hashlib
import itertools
import string
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from pipelines.corpus.fetch import fetch
from pipelines.corpus.find import Columns
from pipelines.corpus.parquet import row_batches
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
        columns: Columns | None,
        templates: list[str],
        decode: DecodeSettings,
        fetch_threads: int,
        fetch_timeout: float,
    ):
        self.store, self.columns, self.templates, self.decode = store, columns, templates, decode
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
        record = next(self._records(span))
        self._fetch_missing([record])
        data = record["data"]
        sha256 = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None
        return {"id": record["id"], "source": record["source"], "row": record["row"], "sha256": sha256}

    def _fill(self, unit_batch: UnitBatch, records: Iterator[dict[str, Any]], num_samples: int) -> None:
        with unit_batch.timed("read"):
            rows = list(itertools.islice(records, unit_batch.unit.num_images))
            self._fetch_missing(rows)
        if len(rows) != unit_batch.unit.num_images:
            raise ValueError(f"expected {unit_batch.unit.num_images} rows in {unit_batch.unit.name}, got {len(rows)}")
        pixels: list[np.ndarray | Tiles] = []
        with unit_batch.timed("decode"):
            for record in rows:
                data = record["data"]
                sha256 = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None
                where = {"id": record["id"], "source": record["source"], "row": record["row"], "sha256": sha256}
                try:
                    if isinstance(data, Reject):
                        raise data
                    prompts = [fill_template(template, record["fields"]) for template in self.templates]
                    pixels.append(decode_image(data, **asdict(self.decode)))
                    unit_batch.images.append(Image(**where, prompts=prompts))
                except Reject as reject:
                    unit_batch.rejected.append(Rejected(**where, reason=reject.reason, detail=clean(reject.detail)))
                    continue
                if len(unit_batch.images) <= num_samples:
                    unit_batch.images[-1].sample = {}
                    unit_batch.images[-1].references = record["references"]
        unit_batch.arrays = stack_pictures(pixels, self.decode.size)

    def _fetch_missing(self, rows: list[dict[str, Any]]) -> None:
        """Replaces URIs by the bytes they name, several at a time."""
        if self.columns is None or self.columns.kind != "uri":
            return
        with ThreadPoolExecutor(self.fetch_threads) as pool:
            uris = [row["data"] for row in rows]
            got = pool.map(lambda uri: fetch(uri, self.store, self.decode.max_bytes, self.fetch_timeout), uris)
            for row, data in zip(rows, got, strict=True):
                row["data"] = data

    def _records(self, span: SpanRow) -> Iterator[dict[str, Any]]:
        if self.columns is None:
            for unit in span.units:
                yield from (self._file_record(source) for source in unit.sources)
        else:
            yield from self._parquet_records(span, self.columns)

    def _file_record(self, source: str) -> dict[str, Any]:
        path = self.store.join(source)
        record = {"id": source, "source": source, "row": 0, "fields": {}, "references": []}
        try:
            size = self.store.fs.info(path)["size"]
            if size > self.decode.max_bytes:
                return {**record, "data": Reject("too_large_bytes", f"{size} bytes")}
            return {**record, "data": self.store.fs.cat_file(path)}
        except (FileNotFoundError, PermissionError) as error:
            return {**record, "data": Reject("fetch", f"{type(error).__name__}: {source}")}

    def _parquet_records(self, span: SpanRow, columns: Columns) -> Iterator[dict[str, Any]]:
        source = span.units[0].sources[0]
        for row, batch in row_batches(self.store, span.rows, columns.to_read(with_references=span.num_samples > 0)):
            yield from self._rows(batch, source, row, columns)

    def _rows(self, batch: Any, source: str, row: int, columns: Columns) -> Iterator[dict[str, Any]]:
        """One record a row; the image is the only large value and is copied out of Arrow once."""
        images = batch.column(columns.image)
        if columns.kind == "struct":
            images = images.field("bytes")
        for i in range(batch.num_rows):
            fields = {name: batch.column(name)[i].as_py() for name in columns.fields}
            key = batch.column(columns.id)[i].as_py() if columns.id else None
            references = columns.references and columns.references in batch.schema.names
            texts = batch.column(columns.references)[i].as_py() if references else []
            yield {
                "id": f"{source}#{row + i}" if key is None else str(key),
                "source": source,
                "row": row + i,
                "fields": fields,
                "references": [texts] if isinstance(texts, str) else list(texts or []),
                "data": images[i].as_py(),
            }


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
