"""The first stage, a CPU task: reads a span of units and yields one row for each unit, with decoded pixels.

The stage adds `meta` and the array `pixels`, uint8, of the images fit to be captioned: one row for each picture, its
frame flattened. It rejects an image that cannot be read. A file that cannot be read fails its units.
"""

import hashlib
import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from otprune.families import Geometry
from pipelines.corpus.columns import Columns
from pipelines.corpus.fetch import fetch
from pipelines.corpus.format import Format, Record
from pipelines.images.decode import Picture, Reject, decode_image
from pipelines.output.span import SpanRow
from pipelines.stages.ragged import Ragged
from pipelines.stages.unit_batch import Image, Rejected, UnitBatch
from pipelines.store import Store
from pipelines.text import clean


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """The model's geometry and the limits of the images that are decoded."""

    geometry: Geometry
    max_bytes: int
    max_pixels: int
    min_side: int
    color_profiles: bool = True
    more_formats: tuple[str, ...] = ()

    def __call__(self, data: bytes | None) -> Picture:
        """The image in `data` (`decode_image`)."""
        return decode_image(
            data,
            geometry=self.geometry,
            max_bytes=self.max_bytes,
            max_pixels=self.max_pixels,
            min_side=self.min_side,
            color_profiles=self.color_profiles,
            more_formats=self.more_formats,
        )


class Reader(Protocol):
    """The interface of the first stage, for every kind of job."""

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields a row with decoded images for each unit of the span in `row`."""
        ...

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """The fields of a `Rejected` that identify the only image of a span. Does not decode the image."""
        ...


class ReadDecode:
    """Reads and decodes the images of a span, one unit at a time. Memory holds one unit and one read batch."""

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
        records = self._records(span)  # one iterator for all units: the file is read once, from start to end
        yield from fill_units(
            span,
            lambda unit_batch: self._fill(
                unit_batch, records, span.num_samples if unit_batch.unit == span.units[0] else 0
            ),
        )

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """id, source, row and sha256 of the only image of a span. Does not decode the image."""
        [record] = self._fetch([next(self._records(span))])
        return _identity(record)

    def _fill(self, unit_batch: UnitBatch, records: Iterator[Record], num_samples: int) -> None:
        """Takes the next records for the unit, decodes their images and samples the first `num_samples` of them."""
        num_images = unit_batch.unit.num_images
        with unit_batch.timed("read"):
            unit_records = self._fetch(list(itertools.islice(records, num_images)))
        if len(unit_records) != num_images:
            raise ValueError(f"expected {num_images} rows in {unit_batch.unit.name}, got {len(unit_records)}")
        pictures: list[Picture] = []
        with unit_batch.timed("decode"):
            for record in unit_records:
                identity = _identity(record)
                try:
                    if isinstance(record.data, Reject):
                        raise record.data
                    assert not isinstance(record.data, str), "URIs are fetched before images are decoded"
                    prompts = [fill_template(template, record.fields) for template in self.templates]
                    pictures.append(self.decode(record.data))
                    unit_batch.images.append(Image(**identity, prompts=prompts, sizes=[pictures[-1].size]))
                except Reject as reject:
                    unit_batch.rejected.append(Rejected(**identity, reason=reject.reason, detail=clean(reject.detail)))
                    continue
                if len(unit_batch.images) <= num_samples:
                    unit_batch.images[-1].sampled = True
                    unit_batch.images[-1].references = record.references
            unit_batch.arrays = {"pixels": flat_pixels(pictures)}

    def _fetch(self, records: list[Record]) -> list[Record]:
        """The records, with the bytes behind a URI in place of the URI. Several threads fetch at a time."""
        uris = [record.data for record in records if isinstance(record.data, str)]
        if not uris:
            return records
        with ThreadPoolExecutor(self.fetch_threads) as pool:
            fetched = pool.map(lambda uri: fetch(uri, self.store, self.decode.max_bytes, self.fetch_timeout), uris)
            return [replace(r, data=next(fetched)) if isinstance(r.data, str) else r for r in records]

    def _records(self, span: SpanRow) -> Iterator[Record]:
        return self.format.records(
            self.store,
            span.rows,
            self.columns,
            max_bytes=self.decode.max_bytes,
            with_references=span.num_samples > 0,
        )


def flat_pixels(pictures: Sequence[Picture]) -> Ragged:
    """The array `pixels` of a unit's pictures: a row for each, its frame flattened."""
    return Ragged.of([picture.pixels.reshape(-1) for picture in pictures], np.empty(0, np.uint8))


def _identity(record: Record) -> dict[str, Any]:
    """The fields with which both `Image` and `Rejected` identify an image."""
    sha256 = hashlib.sha256(record.data).hexdigest() if isinstance(record.data, bytes) else None
    return {"id": record.id, "source": record.source, "row": record.row, "sha256": sha256}


def fill_units(span: SpanRow, fill: Callable[[UnitBatch], None]) -> Iterator[dict[str, Any]]:
    """Fills the units of the span in order and yields a row for each. A unit whose `fill` fails gets an `error`."""
    for unit in span.units:
        unit_batch = UnitBatch(unit)
        try:
            fill(unit_batch)
        except Exception as error:  # an unreadable file or store fails its units; the driver decides about a retry
            unit_batch = UnitBatch(unit, error=f"read: {type(error).__name__}: {clean(str(error))}")
        yield unit_batch.to_row()


def fill_template(template: str, fields: dict[str, Any]) -> str:
    """The template with each column name in braces replaced by the row's value.

    Raises:
        Reject: with reason `prompt`, if a column is null.
    """
    if null_columns := [name for name, value in fields.items() if value is None]:
        raise Reject("prompt", f"column {null_columns[0]} is null")
    # `str.format` would take a column named 0 for a positional argument.
    pieces = ((text, name) for text, name, _, _ in string.Formatter().parse(template))
    return "".join(text + ("" if name is None else str(fields[name])) for text, name in pieces)
