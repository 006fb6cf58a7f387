"""Encodes a part of an output as a Parquet file with totals in its metadata. reader.py reads parts."""

import hashlib
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.reader import METADATA_KEY

DIGEST = "digest"  # a key of the metadata


def encode_table(rows: list[dict[str, Any]], schema: pa.Schema, metadata: dict[str, Any]) -> bytes:
    """The rows as the bytes of a Parquet file, with `metadata` as JSON under `METADATA_KEY` of its footer.

    To the metadata comes the digest of all of it, so that a later change of any value is found.
    """
    table = pa.Table.from_pylist(rows, schema)
    stored = json.dumps({**metadata, DIGEST: digest_of(table, metadata)})
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: stored}), stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()


def digest_of(table: pa.Table, metadata: dict[str, Any]) -> str:
    """A hash (sha256, in hex) of all rows with the names of their columns, and of the metadata but for its digest."""
    content = [table.to_pylist(), {name: value for name, value in metadata.items() if name != DIGEST}]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
