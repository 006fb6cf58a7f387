"""Reads all parts of an output: in order, in threads, a bounded number at a time.

A part is the Parquet file `<folder>/part-....parquet` that commits a unit. It holds rows, and totals in its metadata.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.store import Store, in_threads
from pipelines.text import clean

METADATA_KEY = b"otprune"
QUARANTINE_FOLDER = "quarantine"
DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError)
"""Errors of what is not Parquet, unreadable, of a missing column or without its metadata."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part with its quarantine."""

    name: str
    totals: dict[str, Any]  # the part's metadata
    rows: pa.Table
    quarantine: pa.Table | None  # None if the unit has no quarantined image


@dataclass(frozen=True, slots=True)
class DamagedPart:
    """A part that cannot be read, and the reason."""

    name: str
    error: str

    def __str__(self) -> str:
        return f"{self.name} is damaged: {self.error}"


@dataclass(frozen=True, slots=True)
class OutputReader:
    """Reads the parts in one folder of an output: those that `names` lists, or all of them in sorted order."""

    store: Store
    folder: str = CAPTIONS_FOLDER

    def names(self) -> list[str]:
        """Sorted names of the parts. Empty if the folder does not exist."""
        return sorted(name for name in self.store.list(self.folder) if name.endswith(".parquet"))

    def totals(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yields the totals in the metadata of each part. Reads only the Parquet footers."""
        return in_threads(lambda name: read_totals(self.store, name, self.folder), self._names_or_all(names))

    def tables(self, columns: Sequence[str] | None, names: Iterable[str] | None = None) -> Iterator[pa.Table]:
        """Yields the `columns` of each part (all columns if None), without the metadata."""

        def read(name: str) -> pa.Table:
            return _read_table(self.store, self.folder, name, columns).replace_schema_metadata(None)

        return in_threads(read, self._names_or_all(names))

    def parts(
        self,
        columns: Sequence[str] | None,
        quarantine: Sequence[str] | None,
        names: Iterable[str] | None = None,
    ) -> Iterator[Part | DamagedPart]:
        """Yields each part with `columns` of its rows and the columns `quarantine` of its quarantine; None is all.

        A part that cannot be read is yielded as a `DamagedPart`, not raised.
        """

        def read(name: str) -> Part | DamagedPart:
            try:
                return self._part(name, columns, quarantine)
            except DAMAGE as error:
                return DamagedPart(name, f"{type(error).__name__}: {clean(str(error))}")

        return in_threads(read, self._names_or_all(names))

    def whole(self, names: Iterable[str], quarantined: Collection[str]) -> Iterator[Part | DamagedPart]:
        """Yields each part with all columns, and with the quarantine of those in `quarantined`.

        Here a `DamagedPart` is one whose bytes came and cannot be read.

        Raises:
            OSError: if a part did not come: nothing is known of it then. Or another one of `STORE_ERRORS`.
        """

        def read(name: str) -> Part | DamagedPart:
            folders = (self.folder, QUARANTINE_FOLDER) if name in quarantined else (self.folder,)
            tables = []
            for folder in folders:
                data = self.store.read(f"{folder}/{name}")
                try:
                    tables.append(pq.read_table(pa.BufferReader(data)))
                except DAMAGE as error:
                    return DamagedPart(name, f"{folder}: {type(error).__name__}: {clean(str(error))}")
            try:
                totals = metadata_of(tables[0])
            except DAMAGE as error:
                return DamagedPart(name, f"its metadata: {type(error).__name__}: {clean(str(error))}")
            return Part(name, totals, tables[0], tables[1] if len(tables) > 1 else None)

        return in_threads(read, names)

    def _part(self, name: str, columns: Sequence[str] | None, quarantine: Sequence[str] | None) -> Part:
        rows = _read_table(self.store, self.folder, name, columns)
        rejected = None
        if self.store.exists(f"{QUARANTINE_FOLDER}/{name}"):
            rejected = _read_table(self.store, QUARANTINE_FOLDER, name, quarantine)
        return Part(name, metadata_of(rows), rows, rejected)

    def _names_or_all(self, names: Iterable[str] | None) -> Iterable[str]:
        return self.names() if names is None else names


def read_totals(store: Store, name: str, folder: str = CAPTIONS_FOLDER) -> dict[str, Any]:
    """The totals in the metadata of one part.

    Raises:
        FileNotFoundError: if there is no such part; one of `DAMAGE` if it cannot be read.
    """
    with store.fs.open(store.join(folder, name), "rb") as stream:
        return json.loads(pq.read_metadata(stream).metadata[METADATA_KEY])


def metadata_of(rows: pa.Table) -> dict[str, Any]:
    """The metadata of a part or of a part of the quarantine.

    Raises:
        One of `DAMAGE`: if there is none.
    """
    found = json.loads(rows.schema.metadata[METADATA_KEY])
    if not isinstance(found, dict):
        raise TypeError(f"expected a JSON object, got {type(found).__name__}")
    return found


def _read_table(store: Store, folder: str, name: str, columns: Sequence[str] | None) -> pa.Table:
    with store.fs.open(store.join(folder, name), "rb") as stream:
        return pq.read_table(stream, columns=None if columns is None else list(columns))
