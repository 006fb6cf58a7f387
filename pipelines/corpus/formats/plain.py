"""Schemas without extension types: whoever wrote a file chose them, and some run code of the file when it is read.

pyarrow asks a process-wide register what an extension type is, and Ray registers types whose values, or whose
descriptions, are pickled objects. Here the key that leads pyarrow to the register is renamed before pyarrow sees it, so
that columns are what the file stores: numbers, bytes, text, lists and structs.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

EXTENSION, RENAMED_EXTENSION = b"ARROW:extension:name", b"ARROW:extension-name"
DESCRIPTION = b"ARROW:extension:metadata"
ARROW_SCHEMA, RENAMED_SCHEMA = b"ARROW:schema", b"ARROW-schema"  # of a Parquet file, in base64
PICKLED = ("ray.data.arrow_pickled_object", "arrow.py_extension_type")  # extension types of pickled Python objects
PARQUET_MAGIC = b"PAR1"


class PickleError(ValueError):
    """A column holds pickled Python objects, which are programs."""


def plain_schema(stored: bytes) -> pa.Schema:
    """The schema in an encapsulated message of Arrow IPC, with the types that are stored.

    Raises:
        PickleError: if a column or a part of one is a pickled object.
        pa.ArrowException: if the bytes are no schema.
    """
    schema = pa.ipc.read_schema(pa.py_buffer(stored.replace(EXTENSION, RENAMED_EXTENSION)))
    for field in schema:
        for part in _parts(field, field.name):
            _check_data(*part)
    return schema


def _parts(field: pa.Field, name: str) -> Iterator[tuple[str, str, bytes]]:
    """Yields (name, extension type or "", its description) of a column and of every part of it."""
    metadata = field.metadata or {}
    yield name, metadata.get(RENAMED_EXTENSION, b"").decode(errors="replace"), metadata.get(DESCRIPTION, b"")
    for i in range(field.type.num_fields):
        part = field.type.field(i)
        yield from _parts(part, f"{name}.{part.name}")


def _check_data(name: str, extension: str, description: bytes) -> None:
    """Raises PickleError for types of pickled objects, and for Ray's tensors whose shape is a pickled object."""
    if extension in PICKLED or (extension.startswith("ray.") and not _is_json(description)):
        raise PickleError(f"column {name} must hold data, got pickled Python objects (type {extension})")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def plain_footer(stream: IO[bytes] | io.RawIOBase, size: int) -> pq.FileMetaData:
    """The footer of a Parquet file. A reader that gets it as `metadata` makes no extension types.

    Raises:
        PickleError: if a column or a part of one is a pickled object.
        ValueError, pa.ArrowException: if the file has no such footer.
    """
    stored = read_footer_bytes(stream, size)
    renamed = _parse(stored.replace(ARROW_SCHEMA, RENAMED_SCHEMA), size)
    text = (renamed.metadata or {}).get(RENAMED_SCHEMA)
    if text is None:
        return renamed
    try:
        schema = base64.b64decode(text, validate=True)
    except binascii.Error:
        return renamed
    if EXTENSION in schema:
        plain_schema(schema)
        return renamed
    # A second schema might be the one that pyarrow takes.
    return _parse(stored, size) if stored.count(ARROW_SCHEMA) == 1 else renamed


def read_footer_bytes(stream: IO[bytes] | io.RawIOBase, size: int) -> bytes:
    """The footer as it is stored.

    Raises:
        ValueError: if the file is no Parquet file, or is shorter than its footer.
    """
    if size < 12:
        raise ValueError(f"a Parquet file has at least 12 bytes, got {size}")
    stream.seek(size - 8)
    end = stream.read(8) or b""
    length = int.from_bytes(end[:4], "little")
    if end[4:] == b"PARE":
        raise ValueError("the footer is encrypted")
    if end[4:] != PARQUET_MAGIC:
        raise ValueError("it does not end as a Parquet file does")
    if length > size - 12:
        raise ValueError(f"the footer must fit in the file's {size} bytes, got {length}")
    stream.seek(size - 8 - length)
    return stream.read(length) or b""


def _parse(stored: bytes, size: int) -> pq.FileMetaData:
    """pyarrow's form of a footer; `size` is that of the whole file."""
    whole = b"".join((PARQUET_MAGIC, stored, len(stored).to_bytes(4, "little"), PARQUET_MAGIC))
    return pq.ParquetFile(pa.BufferReader(whole)).metadata
