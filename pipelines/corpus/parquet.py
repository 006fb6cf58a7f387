"""The format of Parquet files: reads their footers, and their rows one bounded batch at a time."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

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
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.listing import Listing
from pipelines.corpus.rows import records_of, references_of, with_base
from pipelines.errors import UserError
from pipelines.store import Store, in_threads

SUFFIX = re.compile(r"\.(parquet|parq|pq)(\.(gzip|gz|snappy|zstd|zst|lz4|brotli|br))?$")
BATCH_BYTES = 32 * 2**20  # encoded images that a reader holds at a time
BLOCK_BYTES = 8 * 2**20  # size of one ranged GET


def is_parquet(name: str) -> bool:
    """Whether a file's name ends in the suffix of a Parquet file, with or without its compression."""
    return bool(SUFFIX.search(name.lower()))


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The Parquet files that have rows, with their row groups, and the columns to read.

    Raises:
        UserError: if a file is damaged, no image column is usable, columns read differently in two files, or there are
            no rows.
    """
    footers = dict(zip(names, in_threads(lambda name: read_footer(listing.store, name), names), strict=True))
    schemas = {name: footer.schema.to_arrow_schema() for name, footer in footers.items()}
    merged = merge_schemas(schemas.values())
    partitions = dict.fromkeys(column for name in names for column in partitions_of(name))
    columns = find_columns(merged, choice, tuple(partitions))
    files, has_paths = [], False
    for name, footer in footers.items():
        check_alike(name, schemas[name], merged, columns)
        groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        if sum(groups):
            files.append(CorpusFile(name, listing.sizes[name], groups))
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


def read_footer(store: Store, name: str) -> pq.FileMetaData:
    """The footer of a Parquet file.

    Raises:
        UserError: if the file is not readable Parquet.
    """
    try:
        with store.fs.open(store.join(name), "rb") as stream:
            return pq.read_metadata(stream)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each row, and reads only the columns that the record needs."""
    assert columns is not None
    source = rows.sources[0]
    for row, batch in row_batches(store, rows, columns.to_read(with_references)):
        yield from records_of(batch, source, row, columns, max_bytes)


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    if columns is None or columns.references is None:
        return {}
    with store.fs.open(store.join(file.source), "rb") as stream:
        column = pq.read_table(stream, columns=[columns.references])[columns.references]
    return references_of(column, rows)


def row_batches(store: Store, rows: ReadRange, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (row, batch whose first row is `row`) for a range of rows of a Parquet file.

    Reads only the row groups that hold the range, about BATCH_BYTES at a time.
    """
    source, start, stop, groups = rows.sources[0], rows.start, rows.stop, rows.groups
    # The range may need fewer row groups than it was handed: find its first and its last one.
    ends = list(accumulate(groups.rows, initial=groups.start))[1:]
    first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
    row, num_rows = ends[first] - groups.rows[first], sum(groups.rows[first : last + 1])
    chosen = range(groups.first + first, groups.first + last + 1)  # indices in the whole file
    with store.fs.open(store.join(source), "rb", block_size=BLOCK_BYTES) as stream:
        # Without pre-buffering, pyarrow does not load a whole row group, which may be gigabytes, before the first row.
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in chosen]
        mean_bytes = sum(sizes) / max(1, num_rows)
        batches = parquet.iter_batches(
            batch_size=int(max(1, min(64, BATCH_BYTES // max(1, mean_bytes)))),
            row_groups=chosen,
            columns=columns,
            use_threads=False,
        )
        for batch in batches:
            begin, end = max(start - row, 0), min(stop - row, batch.num_rows)
            if begin < end:
                yield row + begin, batch.slice(begin, end - begin)
            row += batch.num_rows
            if row >= stop:
                return


FORMAT = Format(
    name="parquet",
    title="Parquet",
    one_image_a_file=False,
    recognises=is_parquet,
    files=find_files,
    records=read_records,
    references=read_references,
)
