"""Encodes a part of an output as a Parquet file with totals in its metadata. reader.py reads parts."""

import hashlib
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.reader import METADATA_KEY

DIGEST_KEY = b"otprune.digest"


def encode_table(rows: list[dict[str, Any]], schema: pa.Schema, metadata: dict[str, Any]) -> bytes:
    """The rows as the bytes of a Parquet file, with `metadata` as JSON under `METADATA_KEY` of its footer.

    Beside it, under `DIGEST_KEY`, stands the digest of all of it, so that a later change of any value is found.
    """
    table = pa.Table.from_pylist(rows, schema.with_metadata({METADATA_KEY: json.dumps(metadata)}))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), DIGEST_KEY: digest_of(table)})
    pq.write_table(table, stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()


def digest_of(table: pa.Table) -> str:
    """A hash (sha256, in hex) of the metadata and of all rows with the names of their columns."""
    metadata = (table.schema.metadata or {}).get(METADATA_KEY, b"")
    return hashlib.sha256(metadata + json.dumps(table.to_pylist(), default=str).encode()).hexdigest()
