"""Records of Arrow tables, for every format whose rows become one: Parquet, Arrow files, JSONL and CSV."""

import base64
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_to_bytes
from uuid import UUID

import pyarrow as pa

from pipelines.corpus.columns import Columns, Kind, partitions_of
from pipelines.corpus.file import CorpusFile, ReadRange, covering
from pipelines.corpus.format import Format, Record
from pipelines.corpus.listing import Listing
from pipelines.images.decode import Reject
from pipelines.store import STORE_ERRORS, Store, scheme_of

PEEKED_ROWS = 20  # rows of a corpus that tell what its addresses are relative to
LONGEST_PATH = 1024  # characters of an address without a scheme; longer text is an image in base64, or none


def records_of(batch: pa.RecordBatch, source: str, row: int, columns: Columns, max_bytes: int) -> Iterator[Record]:
    """Yields the records of a batch of a file. The image, the only large value, is copied out when its turn comes.

    Args:
        row: row of the file at which the batch begins.
        max_bytes: a larger image is not copied at all.
    """
    inside = partitions_of(source) if columns.partitions else {}
    present = {name: batch.column(name) for name in batch.schema.names}

    def value(name: str | None, i: int) -> Any:
        """None where the file lacks the column; a `Reject` for text that is not UTF-8."""
        if name in columns.partitions:
            return inside.get(name)
        return _value(present[name][i]) if name in present else None

    images, paths = present[columns.image], None
    if columns.kind == "struct":
        paths = images.field("path") if columns.with_paths and images.type.get_field_index("path") >= 0 else None
        images = images.field("bytes")
    for i in range(batch.num_rows):
        data = _image(images[i], columns.kind, max_bytes)
        if data is None and paths is not None:
            data = _image(paths[i], "uri", max_bytes)
        if isinstance(data, str):
            data = address_of(data, source, columns)
        fields = {name: value(name, i) for name in columns.fields}
        if bad := [name for name, each in fields.items() if isinstance(each, Reject)]:
            data = Reject("prompt", f"column {bad[0]} is not UTF-8")
        references = value(columns.references, i) if columns.references in (*present, *inside) else None
        yield Record(
            id=id_of(value(columns.id, i), f"{source}#{row + i}"),
            source=source,
            row=row + i,
            data=data,
            fields=fields,
            references=[] if isinstance(references, Reject) else as_list(references),
        )


def _image(scalar: Any, kind: Kind, max_bytes: int) -> bytes | str | Reject | None:
    """The image, or its address."""
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if not scalar.is_valid:
        return None
    if (buffer := scalar.as_buffer()) is not None and buffer.size > max_bytes and kind != "uri":
        return Reject("too_large_bytes", f"{buffer.size} bytes, limit {max_bytes}")
    value = _value(scalar)
    if isinstance(value, bytes) and kind == "uri":
        return value.decode(errors="replace")
    return Reject("fetch", "the address is not UTF-8") if isinstance(value, Reject) else value


def _value(scalar: Any) -> Any:
    """The Python value of a column; of text that is not UTF-8 a `Reject` with the text as far as it can be read."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        text = scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b""
        return Reject("prompt", text.decode(errors="backslashreplace"))


def references_of(column: pa.ChunkedArray | pa.Array, rows: Sequence[int]) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` of a whole column that have any."""
    values = ((row, _value(column[row])) for row in rows if row < len(column))
    references = {row: as_list(value) for row, value in values if not isinstance(value, Reject)}
    return {row: nonempty for row, texts in references.items() if (nonempty := [text for text in texts if text])}


def id_of(value: Any, otherwise: str) -> str:
    """An id as text: bytes are read as UTF-8, or as a UUID, or written in hexadecimal."""
    if value is None:
        return otherwise
    if isinstance(value, Reject):  # text that is not UTF-8 is no reason to lose an image
        return value.detail
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return str(UUID(bytes=value)) if len(value) == 16 else value.hex()
    return str(value)


def as_list(texts: str | list[str] | None) -> list[str]:
    """The captions of a row, whether its column holds one or a list."""
    return [texts] if isinstance(texts, str) else list(texts or [])


def address_of(address: str, source: str, columns: Columns) -> str | bytes | Reject | None:
    """An address that a row of a file holds, relative to the corpus if it is relative; of `data:`, what it holds.

    A `Reject` if the text is no address at all; None if it is empty.
    """
    address = address.strip()
    scheme = scheme_of(address)
    if scheme:
        return f"{scheme}://{address.partition('://')[2]}"
    if address.startswith("data:"):
        return _decode_data(address)
    if len(address) > LONGEST_PATH:
        return Reject("fetch", f"{len(address)} characters without a scheme such as https:// or data: are no address")
    return (_below(posixpath.dirname(source), address) if columns.folder_relative else address) or None


def _decode_data(address: str) -> bytes | Reject:
    """The content of a `data:` address (RFC 2397)."""
    head, _, body = address.partition(",")
    content = unquote_to_bytes(body)
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return content
    try:
        return base64.b64decode(content)
    except ValueError as error:
        return Reject("fetch", f"a data: address that is no base64: {error}")


def is_relative(address: str) -> bool:
    """Whether an address is a path relative to the corpus."""
    return not scheme_of(address) and not address.startswith(("/", "data:"))


def with_base(columns: Columns, format: Format, listing: Listing, files: Sequence[CorpusFile]) -> Columns:
    """The columns with the folder that relative addresses start from: that of their file, if the first one is there.

    Looks at the first rows of a corpus of addresses, and at the first of them that is relative.
    """
    if columns.kind != "uri" and not columns.with_paths:
        return columns
    file = next((file for file in files if "/" in file.source), files[0])
    stop = min(PEEKED_ROWS, file.num_rows)
    [groups] = covering(file, [(0, stop)])
    rows = ReadRange((file.source,), 0, stop, groups)
    records = format.records(listing.store, rows, columns, max_bytes=2**20, with_references=False)
    addresses = (record.data for record in records if isinstance(record.data, str))
    address = next((each for each in addresses if is_relative(each)), None)
    if address is None:
        return columns
    if _exists(listing.store, _below(posixpath.dirname(file.source), address)):
        return replace(columns, folder_relative="/" in file.source)
    # Datasets saved with their images keep the names that the files once had.
    return replace(columns, with_paths=columns.with_paths and _exists(listing.store, address))


def _exists(store: Store, address: str) -> bool:
    try:
        return store.exists(address)
    except STORE_ERRORS:
        return False


def _below(folder: str, address: str) -> str:
    return f"{folder}/{address}" if folder and is_relative(address) else address
