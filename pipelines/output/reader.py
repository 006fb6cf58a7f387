"""Reading all parts of an output: in order, in threads, a bounded number at a time.

A part is a Parquet object that commits a unit, `<folder>/part-....parquet`: rows, and totals in its metadata.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.store import Store, in_threads
from pipelines.text import clean

METADATA_KEY = b"otprune"
QUARANTINE_FOLDER = "quarantine"
DAMAGE = (pa.ArrowException, OSError, LookupError, TypeError)  # no Parquet, no metadata, no such column


@dataclass(frozen=True, slots=True)
class Part:
    """A committed object with its quarantine: what its metadata says, and the rows that it holds."""

    name: str
    totals: dict[str, Any]
    rows: pa.Table
    quarantine: pa.Table | None  # None if the unit has no quarantined image


@dataclass(frozen=True, slots=True)
class DamagedPart:
    """A part that cannot be read, and why."""

    name: str
    error: str

    def __str__(self) -> str:
        return f"{self.name} is damaged: {self.error}"


@dataclass(frozen=True, slots=True)
class OutputReader:
    """Reads the parts in one folder of an output. `names` are all of them, in their order, unless they are given."""

    store: Store
    folder: str = CAPTIONS_FOLDER

    def names(self) -> list[str]:
        """Sorted names of the parts; empty if there is no such folder."""
        return sorted(name for name in self.store.list(self.folder) if name.endswith(".parquet"))

    def totals(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """The totals in the metadata of each part. Reads footers alone."""
        return in_threads(lambda name: read_totals(self.store, name, self.folder), self._these(names))

    def tables(self, columns: Sequence[str] | None, names: Iterable[str] | None = None) -> Iterator[pa.Table]:
        """The `columns` of each part, all of them if None, without the metadata."""

        def read(name: str) -> pa.Table:
            return _read_table(self.store, self.folder, name, columns).replace_schema_metadata(None)

        return in_threads(read, self._these(names))

    def parts(
        self, columns: Sequence[str], quarantine: Sequence[str], names: Iterable[str] | None = None
    ) -> Iterator[Part | DamagedPart]:
        """Each part with the `columns` of its rows and those of its `quarantine`; a damaged part is a value."""

        def read(name: str) -> Part | DamagedPart:
            try:
                return self._part(name, columns, quarantine)
            except DAMAGE as error:
                return DamagedPart(name, f"{type(error).__name__}: {clean(str(error))}")

        return in_threads(read, self._these(names))

    def _part(self, name: str, columns: Sequence[str], quarantine: Sequence[str]) -> Part:
        rows = _read_table(self.store, self.folder, name, columns)
        rejected = None
        if self.store.exists(f"{QUARANTINE_FOLDER}/{name}"):
            rejected = _read_table(self.store, QUARANTINE_FOLDER, name, quarantine)
        return Part(name, json.loads(rows.schema.metadata[METADATA_KEY]), rows, rejected)

    def _these(self, names: Iterable[str] | None) -> Iterable[str]:
        return self.names() if names is None else names


def read_totals(store: Store, name: str, folder: str = CAPTIONS_FOLDER) -> dict[str, Any]:
    """The totals in the metadata of one part."""
    with store.fs.open(store.join(folder, name), "rb") as stream:
        return json.loads(pq.read_metadata(stream).metadata[METADATA_KEY])


def _read_table(store: Store, folder: str, name: str, columns: Sequence[str] | None) -> pa.Table:
    with store.fs.open(store.join(folder, name), "rb") as stream:
        return pq.read_table(stream, columns=None if columns is None else list(columns))
