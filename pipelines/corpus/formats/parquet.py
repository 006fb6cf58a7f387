"""The format of Parquet files: reads their footers, and their rows one bounded batch at a time.

What cannot be read costs its own rows: a value of text that is no UTF-8 its row, a page the rest of its row group, a
footer the file. Each of these rows becomes a record with a `Reject` that names the rows.
"""

import hashlib
import logging
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.columns import (
    ColumnChoice,
    Columns,
    check_alike,
    find_columns,
    merge_schemas,
    partitions_of,
)
from pipelines.corpus.fault import FetchFault
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.formats.plain import PickleError, plain_footer
from pipelines.corpus.formats.rows import records_of, references_of, with_base
from pipelines.corpus.listing import Listing
from pipelines.corpus.ranges import RangeFile
from pipelines.errors import UserError
from pipelines.images.decode import Reject
from pipelines.store import Store, in_threads
from pipelines.text import clean

logger = logging.getLogger(__name__)

SUFFIX = re.compile(r"\.(parquet|parq|pq)(\.(gzip|gz|snappy|zstd|zst|lz4|brotli|br))?$")
BATCH_BYTES = 32 * 2**20  # encoded images that a reader holds at a time
REPEATED_BYTES = 128 * 2**20  # that a batch may take if all of its values are the largest of a dictionary
SIGNATURE_BYTES = 28  # after a footer in plain text, if columns are encrypted
FOOTERS = 8  # that a process keeps
ROWS_A_BYTE = 1000  # more rows than this for each byte of a file hold no pictures: the footer is wrong
DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError)  # of pyarrow, on bad content

_footers: dict[tuple[Store, str, Any], pq.FileMetaData] = {}


def is_parquet(name: str) -> bool:
    """Whether a file's name ends in the suffix of a Parquet file, with or without its compression."""
    return bool(SUFFIX.search(name.lower()))


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The Parquet files that have rows, with their row groups, and the columns to read.

    Raises:
        UserError: if a file is damaged, no image column is usable, columns read differently in two files, or there are
            no rows.
    """
    read = in_threads(lambda name: _footer_or_problem(listing.store, name, listing.sizes[name]), names)
    footers = dict(zip(names, read, strict=True))
    schemas = {name: each.schema.to_arrow_schema() for name, each in footers.items() if not isinstance(each, str)}
    if not schemas:
        raise UserError(f"{names[0]} is not a readable Parquet file: {footers[names[0]]}")
    merged = merge_schemas(schemas.values())
    partitions = dict.fromkeys(column for name in names for column in partitions_of(name))
    columns = find_columns(merged, choice, tuple(partitions))
    files, has_paths = [], False
    for name, footer in footers.items():
        if isinstance(footer, str):  # nobody knows its rows: one row of quarantine stands for them
            logger.warning("%s is not a readable Parquet file and counts as one row: %s", name, footer)
            files.append(CorpusFile(name, listing.sizes[name], (1,)))
            continue
        check_alike(name, schemas[name], merged, columns)
        groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        if sum(groups):
            files.append(CorpusFile(name, listing.sizes[name], groups, tag=_tag(footer)))
            has_paths = has_paths or (columns.kind == "struct" and _lacks_bytes(footer, columns.image))
    if not files:
        raise UserError(
            f"input.path must hold images, found {len(names)} Parquet files without rows in {listing.store.path}"
        )
    columns = replace(columns, with_paths=has_paths)
    columns = with_base(columns, FORMAT, listing, files)
    empty = len(names) - len(files)
    return Found(files, columns, {"Parquet files without rows": empty} if empty else {})


def _lacks_bytes(footer: pq.FileMetaData, image: str) -> bool:
    """Whether some row of a struct column may have a path but no bytes, by the statistics of the row groups."""
    paths = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
    if f"{image}.bytes" not in paths or f"{image}.path" not in paths:
        return False
    index = paths[f"{image}.bytes"]
    statistics = (footer.row_group(i).column(index).statistics for i in range(footer.num_row_groups))
    return any(each is None or not each.has_null_count or each.null_count > 0 for each in statistics)


def _tag(footer: pq.FileMetaData) -> str:
    """A hash of what a footer says about every column chunk: places, bytes, and statistics of the values."""
    stream = pa.BufferOutputStream()
    footer.write_metadata_file(stream)
    return hashlib.sha256(stream.getvalue()).hexdigest()[:16]


def read_footer(store: Store, name: str) -> pq.FileMetaData:
    """The footer of a Parquet file.

    Raises:
        UserError: if the file is not readable Parquet.
    """
    footer = _footer_or_problem(store, name)
    if isinstance(footer, str):
        raise UserError(f"{name} is not a readable Parquet file: {footer}")
    return footer


def _footer_or_problem(store: Store, name: str, size: int | None = None) -> pq.FileMetaData | str:
    """The footer of a Parquet file, or in a line why it is none.

    Raises:
        UserError: if the store does not give the file, or its columns are encrypted.
    """
    try:
        stream = RangeFile(store, name, size)
        footer = plain_footer(stream, stream.size)
        stream.seek(-8, 2)
        (length,) = struct.unpack("<I4x", stream.read(8))
        encrypted = length - footer.serialized_size >= SIGNATURE_BYTES
        _check_rows(footer, stream.size)
    except PickleError as error:
        raise UserError(f"{name}: {error}") from error
    except DAMAGE as error:
        if isinstance(error, FetchFault) and error.passing:
            raise UserError(f"{name} cannot be read: {error}") from error
        encrypted = "encrypted" in str(error)
        if not encrypted:
            return _problem(error)
        footer = ""
    if encrypted:  # pyarrow would end the whole process at the first look at such a column
        raise UserError(f"{name} is not a readable Parquet file: its columns are encrypted; decrypt them first")
    return footer


def _check_rows(footer: pq.FileMetaData, size: int) -> None:
    """Raises ValueError if a file of `size` bytes cannot have the rows that its footer says."""
    rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    if any(count < 0 for count in rows):
        raise ValueError("a row group has a negative number of rows")
    if sum(rows) > ROWS_A_BYTE * size:
        raise ValueError(f"{size} bytes cannot hold {sum(rows)} rows")


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each row, and reads only the columns that the record needs."""
    assert columns is not None
    source = rows.sources[0]
    for row, batch in readable_batches(store, rows, columns.to_read(with_references)):
        if isinstance(batch, Unreadable):
            yield from (Record(f"{source}#{i}", source, i, batch.reject) for i in range(row, batch.stop))
        else:
            yield from records_of(batch, source, row, columns, max_bytes)


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    if columns is None or columns.references is None:
        return {}
    column = _open(RangeFile(store, file.source), file.source).read([columns.references])[columns.references]
    return references_of(column, rows)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Rows that cannot be read, up to `stop`."""

    stop: int
    reject: Reject


def row_batches(store: Store, rows: ReadRange, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """As `readable_batches`, for rows that must all be readable.

    Raises:
        ValueError: if a row cannot be read.
    """
    for row, batch in readable_batches(store, rows, columns):
        if isinstance(batch, Unreadable):
            raise ValueError(batch.reject.detail)
        yield row, batch


def readable_batches(
    store: Store, rows: ReadRange, columns: list[str]
) -> Iterator[tuple[int, pa.RecordBatch | Unreadable]]:
    """Yields (row, batch whose first row is `row`) for a range of rows of a Parquet file.

    Reads only the row groups that hold the range, about BATCH_BYTES at a time.

    Raises:
        FetchFault: a passing one, for all rows from the next on.
    """
    source, start, stop, groups = rows.sources[0], rows.start, rows.stop, rows.groups
    # The range may need fewer row groups than it was handed: find its first and its last one.
    ends = list(accumulate(groups.rows, initial=groups.start))[1:]
    first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
    try:
        stream = RangeFile(store, source)
        parquet = _open(stream, source)
        stream.want(range_ for i in range(first, last + 1) for range_ in _chunks(parquet, groups.first + i, columns))
    except DAMAGE as error:
        yield start, Unreadable(stop, _reject(error, source, start, stop))
        return
    for i in range(first, last + 1):
        if not groups.rows[i]:
            continue  # of an empty row group, a writer states any bytes
        begin, end = max(start, ends[i] - groups.rows[i]), min(stop, ends[i])
        row = begin
        try:
            if not all(0 < low <= high <= stream.size for low, high in _chunks(parquet, groups.first + i, columns)):
                raise ValueError(f"row group {groups.first + i} must lie in the file's {stream.size} bytes")
            for at, batch in _batches(parquet, groups.first + i, groups.rows[i], ends[i] - groups.rows[i], columns):
                low, high = max(begin - at, 0), min(end - at, batch.num_rows)
                if low < high:
                    yield at + low, batch.slice(low, high - low)
                    row = at + high
                if at + batch.num_rows >= end:
                    break
            if row < end:
                raise ValueError(f"ends before row {row}")
        except DAMAGE as error:
            yield row, Unreadable(end, _reject(error, source, row, end))


def _batches(
    parquet: pq.ParquetFile, index: int, num_rows: int, start: int, columns: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (row, batch) for one row group, which must have `num_rows` rows and begin at row `start`."""
    group = parquet.metadata.row_group(index)
    if group.num_rows != num_rows:
        raise ValueError(f"row group {index} had {num_rows} rows when the job began, has {group.num_rows}")
    batches = parquet.iter_batches(
        batch_size=_batch_rows(group, columns), row_groups=[index], columns=columns, use_threads=False
    )
    for batch in batches:
        yield start, batch
        start += batch.num_rows


def _batch_rows(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Rows of a batch that are expected to take BATCH_BYTES, and at most REPEATED_BYTES.

    A value that a dictionary holds once may be that of every row.
    """
    rows = BATCH_BYTES // max(1, group.total_byte_size // max(1, group.num_rows))
    for chunk in (group.column(i) for i in range(group.num_columns)):
        if chunk.dictionary_page_offset is not None and _is_read(chunk.path_in_schema, columns):
            rows = min(rows, REPEATED_BYTES // max(1, chunk.total_uncompressed_size))
    return max(1, min(64, rows))


def _is_read(path: str, columns: list[str]) -> bool:
    return any(path == column or path.startswith(column + ".") for column in columns)


def _open(stream: RangeFile, source: str) -> pq.ParquetFile:
    """The file, whose footer a process parses once as long as the file stays the same."""
    # Without pre-buffering, pyarrow does not load a whole row group, which may be gigabytes, before the first row.
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 2**20}
    key = (stream.store, source, stream.version)
    if key not in _footers:
        footer = plain_footer(stream, stream.size)
        if len(_footers) >= FOOTERS:
            del _footers[next(iter(_footers))]
        _footers[key] = footer
    return pq.ParquetFile(stream, metadata=_footers[key], **options)


def _chunks(parquet: pq.ParquetFile, index: int, columns: list[str]) -> Iterator[tuple[int, int]]:
    """Yields the range of bytes of each column chunk of a row group that is needed for `columns`."""
    group = parquet.metadata.row_group(index)
    for i in range(group.num_columns):
        chunk = group.column(i)
        if _is_read(chunk.path_in_schema, columns):
            start = chunk.data_page_offset
            if chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            yield start, start + chunk.total_compressed_size


def _reject(error: Exception, source: str, start: int, stop: int) -> Reject:
    """The row of quarantine for rows [start, stop) of a file that cannot be read.

    Raises:
        FetchFault: if the store is at fault, or refuses the file, of which no row is guilty.
    """
    rows = f"row {start}" if stop == start + 1 else f"rows {start} to {stop - 1}"
    if isinstance(error, FetchFault):
        if error.passing or not error.answered:
            raise FetchFault(f"{source}: {error.detail}", passing=True, answered=False)
        return Reject("fetch", f"{source}, {rows}: {error.detail}")
    return Reject("unreadable", f"{source}, {rows}: {_problem(error)}")


def _problem(error: Exception) -> str:
    """The error in a line. After a colon, the messages of pyarrow may quote what was read."""
    if isinstance(error, FetchFault):
        return error.detail
    return f"{type(error).__name__}: {clean(str(error), 150).partition(':')[0]}"


FORMAT = Format(
    name="parquet",
    title="Parquet",
    one_image_a_file=False,
    recognises=is_parquet,
    files=find_files,
    records=read_records,
    references=read_references,
)
