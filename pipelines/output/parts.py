"""Encodes a part of an output as a Parquet file with totals in its metadata. reader.py reads parts."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.reader import METADATA_KEY


def encode_table(rows: list[dict[str, Any]], schema: pa.Schema, metadata: dict[str, Any]) -> bytes:
    """The rows as the bytes of a Parquet file, with `metadata` as JSON under `METADATA_KEY` of its footer."""
    table = pa.Table.from_pylist(rows, schema.with_metadata({METADATA_KEY: json.dumps(metadata)}))
    pq.write_table(table, stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()
