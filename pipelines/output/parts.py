"""Parquet objects of an output: how they are written, and the totals in their metadata."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.store import Store

METADATA_KEY = b"otprune"


def read_totals(store: Store, name: str, folder: str = CAPTIONS_FOLDER) -> dict[str, Any]:
    """The totals in the metadata of a committed object."""
    with store.fs.open(store.join(folder, name), "rb") as stream:
        return json.loads(pq.read_metadata(stream).metadata[METADATA_KEY])


def encode_table(rows: list[dict[str, Any]], schema: pa.Schema, metadata: dict[str, Any]) -> bytes:
    """The rows as a Parquet file."""
    table = pa.Table.from_pylist(rows, schema.with_metadata({METADATA_KEY: json.dumps(metadata)}))
    pq.write_table(table, stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()
