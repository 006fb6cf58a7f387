"""Records of Arrow tables, for every format whose rows become one: Parquet, Arrow files, JSONL and CSV."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import pyarrow as pa

from pipelines.corpus.columns import Columns, partitions_of
from pipelines.corpus.file import CorpusFile, ReadRange, covering
from pipelines.corpus.format import Format, Record
from pipelines.corpus.listing import Listing
from pipelines.store import STORE_ERRORS, Store, scheme_of

PEEKED_ROWS = 20  # rows of a corpus that tell what its addresses are relative to


def records_of(batch: pa.RecordBatch, source: str, row: int, columns: Columns) -> Iterator[Record]:
    """Yields the records of a batch of a file. The image, the only large value, is copied out when its turn comes.

    Args:
        row: row of the file at which the batch begins.
    """
    inside = partitions_of(source) if columns.partitions else {}
    present = {name: batch.column(name) for name in batch.schema.names}

    def value(name: str | None, i: int) -> Any:
        """None where the file lacks the column."""
        if name in columns.partitions:
            return inside.get(name)
        return present[name][i].as_py() if name in present else None

    images, paths = present[columns.image], None
    if columns.kind == "struct":
        paths = images.field("path") if columns.with_paths and images.type.get_field_index("path") >= 0 else None
        images = images.field("bytes")
    with_references = columns.references is not None and (columns.references in {**present, **inside})
    for i in range(batch.num_rows):
        data = images[i].as_py()
        if data is None and paths is not None:
            data = paths[i].as_py()
        elif isinstance(data, bytes) and columns.kind == "uri":
            data = data.decode(errors="replace")
        if isinstance(data, str):
            data = address_of(data, source, columns)
        yield Record(
            id=id_of(value(columns.id, i), f"{source}#{row + i}"),
            source=source,
            row=row + i,
            data=data,
            fields={name: value(name, i) for name in columns.fields},
            references=as_list(value(columns.references, i)) if with_references else [],
        )


def references_of(column: pa.ChunkedArray | pa.Array, rows: Sequence[int]) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` of a whole column that have any."""
    references = {row: as_list(column[row].as_py()) for row in rows if row < len(column)}
    return {row: nonempty for row, texts in references.items() if (nonempty := [text for text in texts if text])}


def id_of(value: Any, otherwise: str) -> str:
    """An id as text: bytes are read as UTF-8, or as a UUID, or written in hexadecimal."""
    if value is None:
        return otherwise
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return str(UUID(bytes=value)) if len(value) == 16 else value.hex()
    return str(value)


def as_list(texts: str | list[str] | None) -> list[str]:
    """The captions of a row, whether its column holds one or a list."""
    return [texts] if isinstance(texts, str) else list(texts or [])


def address_of(address: str, source: str, columns: Columns) -> str:
    """An address that a row of a file holds, relative to the corpus if it is relative."""
    return _below(posixpath.dirname(source), address) if columns.folder_relative else address


def is_relative(address: str) -> bool:
    """Whether an address is a path relative to the corpus."""
    return not scheme_of(address) and not address.startswith(("/", "data:"))


def with_base(columns: Columns, format: Format, listing: Listing, files: Sequence[CorpusFile]) -> Columns:
    """The columns with the folder that relative addresses start from: that of their file, if the first one is there.

    Looks at the first rows of a corpus of addresses, and at the first of them that is relative.
    """
    if columns.kind != "uri" and not columns.with_paths:
        return columns
    file = next((file for file in files if "/" in file.source), files[0])
    stop = min(PEEKED_ROWS, file.num_rows)
    [groups] = covering(file, [(0, stop)])
    rows = ReadRange((file.source,), 0, stop, groups)
    records = format.records(listing.store, rows, columns, max_bytes=2**20, with_references=False)
    addresses = (record.data for record in records if isinstance(record.data, str))
    address = next((each for each in addresses if is_relative(each)), None)
    if address is None:
        return columns
    if _exists(listing.store, _below(posixpath.dirname(file.source), address)):
        return replace(columns, folder_relative="/" in file.source)
    # Datasets saved with their images keep the names that the files once had.
    return replace(columns, with_paths=columns.with_paths and _exists(listing.store, address))


def _exists(store: Store, address: str) -> bool:
    try:
        return store.exists(address)
    except STORE_ERRORS:
        return False


def _below(folder: str, address: str) -> str:
    return f"{folder}/{address}" if folder and is_relative(address) else address
