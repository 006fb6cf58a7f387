"""The first stage, a CPU task: reads a span of units and yields one row for each unit, with decoded pixels.

The stage adds `meta` and the array `pixels`, uint8, of the images fit to be captioned: one row for each picture, its
frame flattened. It rejects an image that cannot be read, and so the rows of a file that cannot be read. A store that
does not answer is waited for; if it never does, its units fail.
"""

import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from otprune.families import Geometry
from pipelines.corpus.columns import Columns
from pipelines.corpus.fault import OUTAGE, FetchFault, OutageError, fault_of
from pipelines.corpus.fetch import Fetched, Fetcher, FetchSettings, fetcher_of, is_web
from pipelines.corpus.format import Format, InStore, Record
from pipelines.corpus.patience import Patience
from pipelines.images.decode import Picture, Reject, decode_image
from pipelines.output.span import SpanRow
from pipelines.output.unit import Unit
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


@dataclass(slots=True)
class _Row:
    """A row of a unit, decoded, or with what it lacks."""

    record: Record  # without its image
    target: str | InStore | None  # what was fetched for it; None if the corpus holds the image itself
    sha256: str | None = None
    prompts: list[str] = field(default_factory=list)
    picture: Picture | None = None
    fault: Reject | FetchFault | None = None  # None if there is a picture

    @property
    def identity(self) -> dict[str, Any]:
        """The fields with which both `Image` and `Rejected` identify an image."""
        record = self.record
        return {"id": record.id, "source": record.source, "row": record.row, "sha256": self.sha256}

    @property
    def may_be_outage(self) -> bool:
        """Whether this row lacks its image for a reason that other rows may share."""
        return isinstance(self.fault, FetchFault) and self.fault.may_be_outage

    @property
    def waits_for_store(self) -> bool:
        """Whether the store of the corpus did not give this row's file, for a reason that passes."""
        return isinstance(self.fault, FetchFault) and self.fault.passing and not is_web(self.target or "")


class ReadDecode:
    """Reads and decodes the images of a span, one unit at a time.

    Memory holds the pixels of one unit, and a bounded number of encoded bytes, however many images a unit has. While
    nothing answers for any row of a unit, the reader waits up to `patience` seconds; then its units fail.
    """

    def __init__(
        self,
        *,
        store: Store,
        format: Format,
        columns: Columns | None,
        templates: list[str],
        decode: DecodeSettings,
        fetch: FetchSettings,
        patience: float,
    ):
        self.store, self.format, self.columns = store, format, columns
        self.templates, self.decode = templates, decode
        self.fetch, self.patience = fetch, patience

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        span = SpanRow.from_row(row)
        records = _Records(lambda: self._records(span))  # for all units: the file is read once, from start to end
        yield from fill_units(
            span,
            lambda unit_batch: self._fill(
                unit_batch, records, span.num_samples if unit_batch.unit == span.units[0] else 0
            ),
        )

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """id, source, row and sha256 of the only image of a span. Does not decode the image."""
        record = next(_Records(lambda: self._records(span)).take(span.units[0]))
        [(_, data)] = self._fetcher.load([record])
        return _Row(record, None, _sha256(data)).identity

    @property
    def _fetcher(self) -> Fetcher:
        return fetcher_of(self.store, self.fetch, self.decode.max_bytes)

    def _fill(self, unit_batch: UnitBatch, records: "_Records", num_samples: int) -> None:
        """Reads the records of the unit, decodes their images and samples the first `num_samples` of them."""
        rows = self._read(unit_batch, records)
        self._outlast_outage(unit_batch, rows)
        for row in rows:
            if row.picture is None:
                reject = row.fault.reject() if isinstance(row.fault, FetchFault) else row.fault
                assert reject is not None
                detail = clean(reject.detail)
                unit_batch.rejected.append(Rejected(**row.identity, reason=reject.reason, detail=detail))
                continue
            unit_batch.images.append(Image(**row.identity, prompts=row.prompts, sizes=[row.picture.size]))
            if len(unit_batch.images) <= num_samples:
                unit_batch.images[-1].sampled = True
                unit_batch.images[-1].references = row.record.references
        with unit_batch.timed("decode"):
            unit_batch.arrays = {"pixels": flat_pixels([row.picture for row in rows if row.picture is not None])}

    def _read(self, unit_batch: UnitBatch, records: "_Records") -> list[_Row]:
        """The rows of the unit. A store that fails as a whole is waited for, and the unit is read again.

        Raises:
            OutageError: if patience is over.
        """
        patience, unit = Patience(self.patience, self.store.path), unit_batch.unit
        while True:
            try:
                rows = self._load(unit_batch, records.take(unit))
                break
            except Exception as error:  # of the store, by way of a format
                fault = fault_of(error)
                records.restart()  # an iterator that raised has ended
                # Who may not read a file on the local disk never will; in a store, credentials are renewed.
                if not self.patience or not (fault.passing or (fault.may_be_outage and not self.store.is_local)):
                    raise
                with unit_batch.timed("read"):
                    patience.wait(fault)
                self._fetcher.forget()
        if len(rows) != unit.num_images:
            raise ValueError(f"expected {unit.num_images} rows, got {len(rows)}")
        return rows

    def _load(self, unit_batch: UnitBatch, records: Iterator[Record]) -> list[_Row]:
        """The records with their images, fetched several at a time, and decoded one by one as they come."""
        rows, loaded = [], self._fetcher.load(records)
        while True:
            with unit_batch.timed("read"):
                record, data = next(loaded, (None, None))
            if record is None:
                return rows
            target = record.data if isinstance(record.data, str | InStore) else None
            row = _Row(replace(record, data=None), target)
            rows.append(row)
            with unit_batch.timed("decode"):
                self._decode(row, data)

    def _decode(self, row: _Row, data: Fetched) -> None:
        """Decodes the image of a row, or notes why there is none."""
        row.sha256, row.fault = _sha256(data), None
        try:
            if isinstance(data, Reject | FetchFault):
                raise data
            row.prompts = [fill_template(template, row.record.fields) for template in self.templates]
            row.picture = self.decode(data)
        except (Reject, FetchFault) as fault:
            row.fault = fault

    def _outlast_outage(self, unit_batch: UnitBatch, rows: list[_Row]) -> None:
        """Fetches rows again, as long as there is an outage, or the store of the corpus owes files.

        One missing file is the fault of its row. But if nothing at all comes of the web, or of the store, and whatever
        is told is of the kind that all files share (no network, no name, throttled, refused: 401 and 403), then the
        network or the credentials are at fault, and whoever blamed the images would quarantine a corpus. What tells the
        two apart is a file that was fetched before: it still comes, unless there is an outage. With the store of the
        corpus we are more patient than with strangers' servers, of which some are out of order for ever: its passing
        faults are waited for, file by file.

        Raises:
            OutageError: if patience is over and it is an outage.
        """
        what = self.store.path if self.format.one_image_a_file else "addresses"
        patience = Patience(self.patience, what)
        while (outage := self._is_outage(rows)) or (self.patience and any(row.waits_for_store for row in rows)):
            first = next(row.fault for row in rows if (row.may_be_outage if outage else row.waits_for_store))
            assert isinstance(first, FetchFault)
            try:
                with unit_batch.timed("read"):
                    patience.wait(first)
            except OutageError:
                if outage:
                    raise
                return  # other files came: these alone are out of reach
            self._fetch_again(rows)
            if outage and not self._is_outage(rows):
                self._fetch_again(rows)  # those that were tried before the first answer came

    def _is_outage(self, rows: list[_Row]) -> bool:
        """Whether nothing on the web, or nothing in the store, comes for any row, nor what was fetched before."""
        if not self.patience:
            return False
        for web in (True, False):
            fetched = [row for row in rows if row.target is not None and is_web(row.target) == web]
            if not fetched or not all(row.may_be_outage for row in fetched):
                continue
            if len(fetched) == 1 and not isinstance(fetched[0].target, InStore):
                continue  # one address alone may name a server that is gone
            known = self._fetcher.answered.get(web)
            if known is None or isinstance(self._fetcher.fetch(known), FetchFault):
                return True
        return False

    def _fetch_again(self, rows: list[_Row]) -> None:
        """Fetches the rows that lack their images for a reason that other rows may share."""
        lacking, fetcher = [row for row in rows if row.may_be_outage], self._fetcher
        fetcher.forget()
        again = (replace(row.record, data=row.target) for row in lacking)
        for row, (_, data) in zip(lacking, fetcher.load(again), strict=True):
            self._decode(row, data)

    def _records(self, span: SpanRow) -> Iterator[Record]:
        return self.format.records(
            self.store,
            span.rows,
            self.columns,
            max_bytes=self.decode.max_bytes,
            with_references=span.num_samples > 0,
        )


class _Records:
    """The records of a span, which are read in order and can be read again."""

    def __init__(self, make: Callable[[], Iterator[Record]]):
        self._make = make
        self._records = make()

    def restart(self) -> None:
        """Reads from the first record on, as of the next `take`."""
        self._records = self._make()

    def take(self, unit: Unit) -> Iterator[Record]:
        """Yields the unit's records, of those that are tried again, and drops the others."""
        wanted = set(unit.redo)
        for position in range(unit.stop - unit.start):
            record = next(self._records, None)
            while record is not None and len(unit.sources) == 1 and record.row < unit.start:
                record = next(self._records, None)
            if record is None:
                return
            if not wanted or position in wanted:
                yield record


def flat_pixels(pictures: Sequence[Picture]) -> Ragged:
    """The array `pixels` of a unit's pictures: a row for each, its frame flattened."""
    return Ragged.of([picture.pixels.reshape(-1) for picture in pictures], np.empty(0, np.uint8))


def _sha256(data: Fetched) -> str | None:
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None


def fill_units(span: SpanRow, fill: Callable[[UnitBatch], None]) -> Iterator[dict[str, Any]]:
    """Fills the units of the span in order and yields a row for each. A unit whose `fill` fails gets an `error`.

    After an outage the units that follow are not tried.
    """
    outage: str | None = None
    for unit in span.units:
        unit_batch = UnitBatch(unit, error=outage)
        try:
            if outage is None:
                fill(unit_batch)
        except OutageError as error:
            unit_batch = UnitBatch(unit, error=(outage := f"{OUTAGE}{error}"))
        except Exception as error:  # of a stage's own; the driver decides about a retry
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
