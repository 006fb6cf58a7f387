"""The format of Parquet files: reads their footers, and their rows one bounded batch at a time."""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.columns import ColumnChoice, Columns, find_columns
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, Record
from pipelines.corpus.images import is_image
from pipelines.errors import UserError
from pipelines.store import Store

logger = logging.getLogger(__name__)

FOOTER_THREADS = 16
BATCH_BYTES = 32 * 2**20  # encoded images that a reader holds at a time
BLOCK_BYTES = 8 * 2**20  # size of one ranged GET


def is_parquet(name: str) -> bool:
    """Whether a file's name ends in the suffix of a Parquet file."""
    return name.lower().endswith((".parquet", ".parq"))


def find_files(
    store: Store, sizes: Mapping[str, int], choice: ColumnChoice
) -> tuple[Sequence[CorpusFile], Columns | None]:
    """The Parquet files that have rows, with their row groups, and the columns to read.

    Raises:
        UserError: if a file is damaged, no image column is usable, columns differ between files, or there are no rows.
    """
    names = [name for name in sizes if is_parquet(name)]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda name: read_footer(store, name), names))
    schema = footers[0].schema.to_arrow_schema()
    columns = find_columns(schema, choice)
    num_image_files = sum(map(is_image, sizes))
    if num_image_files and columns.kind != "uri":  # URIs may name the image files beside the Parquet files
        logger.warning("%d image files beside the Parquet files are no part of the corpus", num_image_files)
    files = []
    for name, footer in zip(names, footers, strict=True):
        _check_same(name, footer.schema.to_arrow_schema(), schema, columns)
        groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        if sum(groups):
            files.append(CorpusFile(name, sizes[name], groups))
    if not files:
        raise UserError(f"input.path must hold images, found {len(names)} Parquet files without rows in {store.path}")
    return files, columns


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
        yield from _records(batch, source, row, columns)


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    if columns is None or columns.references is None:
        return {}
    with store.fs.open(store.join(file.source), "rb") as stream:
        column = pq.read_table(stream, columns=[columns.references])[columns.references]
    references = {row: _as_list(column[row].as_py()) for row in rows if row < len(column)}
    return {row: nonempty for row, texts in references.items() if (nonempty := [text for text in texts if text])}


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


def _records(batch: pa.RecordBatch, source: str, row: int, columns: Columns) -> Iterator[Record]:
    """Yields the records of a batch. The image, the only large value, is copied out of Arrow when its turn comes."""
    images = batch.column(columns.image)
    if columns.kind == "struct":
        images = images.field("bytes")
    with_references = columns.references is not None and columns.references in batch.schema.names
    for i in range(batch.num_rows):
        id_value = batch.column(columns.id)[i].as_py() if columns.id else None
        yield Record(
            id=f"{source}#{row + i}" if id_value is None else str(id_value),
            source=source,
            row=row + i,
            data=images[i].as_py(),
            fields={name: batch.column(name)[i].as_py() for name in columns.fields},
            references=_as_list(batch.column(columns.references)[i].as_py()) if with_references else [],
        )


def _as_list(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or [])


def _check_same(name: str, schema: pa.Schema, first: pa.Schema, columns: Columns) -> None:
    """Refuses a file whose columns have other types than those of the first file."""
    for column in filter(None, (columns.image, columns.id, columns.references, *columns.fields)):
        got = schema.field(column).type if column in schema.names else "no such column"
        if got != first.field(column).type:
            raise UserError(
                f"{name}: column {column} must be {first.field(column).type} as in the first file, got {got}"
            )


FORMAT = Format(
    name="parquet",
    title="Parquet",
    one_image_a_file=False,
    recognises=is_parquet,
    files=find_files,
    records=read_records,
    references=read_references,
)
