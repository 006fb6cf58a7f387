"""Rows of a Parquet file, a bounded batch at a time."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.file import ReadRange
from pipelines.store import Store

BATCH_BYTES = 32 * 2**20  # encoded images held by a reader at a time
BLOCK_BYTES = 8 * 2**20  # of one ranged GET


def row_batches(store: Store, rows: ReadRange, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(row, batch from that row on) for a range of rows of a Parquet file.

    Reads only the row groups that hold them, and no more than BATCH_BYTES at a time.
    """
    source, start, stop, groups = rows.sources[0], rows.start, rows.stop, rows.groups
    ends = list(accumulate(groups.rows, initial=groups.start))[1:]
    first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)  # a unit needs not all groups of its span
    row, num_rows = ends[first] - groups.rows[first], sum(groups.rows[first : last + 1])
    chosen = range(groups.first + first, groups.first + last + 1)  # as the file counts them
    with store.fs.open(store.join(source), "rb", block_size=BLOCK_BYTES) as stream:
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
