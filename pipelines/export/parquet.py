"""The corpus's Parquet files with columns of captions added."""

from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.find import Corpus
from pipelines.errors import JobFailedError, UserError
from pipelines.export.captions import CaptionColumns, Captioned
from pipelines.export.images import rows_of
from pipelines.export.pieces import Piece
from pipelines.export.target import Target
from pipelines.store import Store
from pipelines.text import clean

BATCH_BYTES = 32 * 2**20  # of a row group that is written, about
BLOCK_BYTES = 8 * 2**20  # size of one ranged GET


def write_parquet(
    piece: Piece, corpus: Corpus, output: Store, target: Target, columns: CaptionColumns, *, keep: bool
) -> list[str]:
    """Writes the Parquet file of a piece under the name of its source, which it returns.

    The other columns, their types and the schema's metadata stay. Memory holds one batch of rows.

    Raises:
        UserError: if the corpus has a column of the same name.
        JobFailedError: if the corpus's file cannot be read.
    """
    assert piece.file is not None
    source, rows = piece.file.source, rows_of(piece, output)
    with corpus.store.fs.open(corpus.store.join(source), "rb", block_size=BLOCK_BYTES) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
        schema = _with_columns(parquet.schema_arrow, columns)
        with target.stream(source) as written, pq.ParquetWriter(written, schema, compression="zstd") as writer:
            for batch in _batches(parquet, source):
                table = _joined(batch, list(islice(rows, batch.num_rows)), columns, schema, keep)
                if table.num_rows:
                    writer.write_table(table)
    return [source]


def _with_columns(schema: pa.Schema, columns: CaptionColumns) -> pa.Schema:
    if doubled := [name for name in columns.schema.names if name in schema.names]:
        raise UserError(
            f"export.column={columns.name} adds the column {doubled[0]}, which the corpus has already; "
            f"choose another name, e.g. export.column=new_{columns.name}"
        )
    for field in columns.schema:
        schema = schema.append(field)
    return schema


def _batches(parquet: pq.ParquetFile, source: str) -> Iterator[pa.RecordBatch]:
    """The file in batches of about BATCH_BYTES. A row group is read about once."""
    metadata = parquet.metadata
    try:
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            mean_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            yield from parquet.iter_batches(max(1, BATCH_BYTES // mean_bytes), row_groups=[i], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise JobFailedError(f"{source} cannot be read: {clean(str(error))}") from error


def _joined(
    batch: pa.RecordBatch, rows: list[Captioned], columns: CaptionColumns, schema: pa.Schema, keep: bool
) -> pa.Table:
    added = pa.Table.from_pylist([columns.values(row) for row in rows], columns.schema)
    arrays = [*(pa.chunked_array([column]) for column in batch.columns), *added.columns]
    table = pa.Table.from_arrays(arrays, schema=schema)
    return table if keep else table.filter(pa.array([bool(row.captions) for row in rows]))
