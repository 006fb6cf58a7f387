"""Rows of a Parquet file, a bounded batch at a time."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.span import SpanRow
from pipelines.store import Store

BATCH_BYTES = 32 * 2**20  # encoded images held by a reader at a time
BLOCK_BYTES = 8 * 2**20  # of one ranged GET


def row_batches(store: Store, span: SpanRow, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(row, batch from that row on) for rows [first unit's start, last unit's stop) of the span's Parquet file.

    Reads only the row groups that hold them, and no more than BATCH_BYTES at a time.
    """
    source, start, stop = span.units[0].sources[0], span.units[0].start, span.units[-1].stop
    ends = np.cumsum(span.row_groups)
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, stop - 1, side="right"))
    row = int(ends[first]) - span.row_groups[first]
    with store.fs.open(store.join(source), "rb", block_size=BLOCK_BYTES) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(first, last + 1)]
        mean_bytes = sum(sizes) / max(1, sum(span.row_groups[first : last + 1]))
        batches = parquet.iter_batches(
            batch_size=int(max(1, min(64, BATCH_BYTES // max(1, mean_bytes)))),
            row_groups=range(first, last + 1),
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
