"""The format of Arrow IPC files, as `datasets.Dataset.save_to_disk` writes them: streams and files of record batches.

Both hold the same messages one after the other: a schema, then record batches. A file has a mark in front of them and
an index behind them, which is not needed. Each message tells its length (arrow.apache.org/docs/format/Columnar.html,
"Encapsulated message format"), so the batches are found by their heads alone, and a reader starts at any of them.
"""

import contextlib
import json
import posixpath
import struct
from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipelines.corpus.columns import ColumnChoice, Columns, check_alike, find_columns, merge_schemas, partitions_of
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.formats.plain import PickleError, plain_schema
from pipelines.corpus.formats.rows import records_of, references_of, with_base
from pipelines.corpus.listing import Listing
from pipelines.corpus.ranged import open_range
from pipelines.errors import UserError
from pipelines.images.decode import Reject
from pipelines.store import STORE_ERRORS, Store, in_threads

MAGIC = b"ARROW1\0\0"  # of a file; a stream begins with its first message
CONTINUATION = b"\xff\xff\xff\xff"
STATE = "state.json"  # of save_to_disk, lists the files of a dataset
SCHEMA_MESSAGE, DICTIONARY_MESSAGE, BATCH_MESSAGE = 1, 2, 3
SLICE_ROWS = 16  # rows of a batch whose images are out of Arrow at a time
ROWS_A_BYTE = 1000  # more rows than this for each byte of a batch hold no pictures: the file is damaged


def is_arrow(name: str) -> bool:
    """Whether a file's name ends in the suffix of an Arrow IPC file."""
    return name.lower().endswith((".arrow", ".arrows", ".feather"))


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The files that have rows, with their record batches, and the columns to read.

    Raises:
        UserError: if a file is damaged or has dictionaries, no image column is usable, or there are no rows.
    """
    names, caches = _of_datasets(listing, names)
    indexed = list(in_threads(lambda name: _index(listing, name), names))
    merged = merge_schemas(schema for _, schema in indexed)
    partitions = dict.fromkeys(column for name in names for column in partitions_of(name))
    columns = find_columns(merged, choice, tuple(partitions))
    for file, schema in indexed:
        check_alike(file.source, schema, merged, columns)
    files = [file for file, _ in indexed if sum(file.row_groups)]
    if not files:
        raise UserError(f"input.path must hold images, found {len(names)} Arrow files without rows")
    columns = with_base(columns, FORMAT, listing, files)
    left_out = {"Arrow files without rows": len(names) - len(files), "caches of the datasets library": caches}
    return Found(files, columns, {reason: count for reason, count in left_out.items() if count})


def _of_datasets(listing: Listing, names: Sequence[str]) -> tuple[list[str], int]:
    """The files that belong to a dataset, and the number of others: state.json lists them, caches lie beside them."""
    listed: dict[str, set[str]] = {}
    for state in (name for name in listing.sizes if posixpath.basename(name) == STATE):
        with contextlib.suppress(ValueError, KeyError, TypeError, *STORE_ERRORS):
            entries = json.loads(listing.store.read(state))["_data_files"]
            listed[posixpath.dirname(state)] = {entry["filename"] for entry in entries}
    kept = [
        name
        for name in names
        if posixpath.basename(name) in listed.get(posixpath.dirname(name), {posixpath.basename(name)})
    ]
    return kept, len(names) - len(kept)


def _index(listing: Listing, name: str) -> tuple[CorpusFile, pa.Schema]:
    """The file with its record batches as row groups, and its schema.

    Raises:
        UserError: if the file is no Arrow IPC file, is cut, or has dictionaries or compressed heads.
    """
    size = listing.sizes[name]
    try:
        with open_range(listing.store, name, 0, size) as stream:
            start = len(MAGIC) if stream.read(len(MAGIC)) == MAGIC else 0
            rows, offsets, end, schema = [], [], start, None
            for kind, num_rows, begin, end in _messages(stream, start, size):
                if kind == SCHEMA_MESSAGE and schema is None:
                    stream.seek(begin)
                    schema = plain_schema(stream.read(end - begin))
                elif kind == BATCH_MESSAGE:
                    if not 0 <= num_rows <= ROWS_A_BYTE * (end - begin):
                        raise ValueError(f"{end - begin} bytes cannot hold {num_rows} rows")
                    rows.append(num_rows)
                    offsets.append(begin)
                else:
                    raise ValueError("columns with dictionaries are not read here; write them plain, or as Parquet")
            if schema is None:
                raise ValueError("it has no schema")
    except PickleError as error:
        raise UserError(f"{name}: {error}") from error
    except (*STORE_ERRORS, pa.ArrowException, struct.error, IndexError) as error:
        raise UserError(f"{name} is not a readable Arrow file: {str(error).splitlines()[0]}") from error
    offsets = (*offsets, end) if rows else ()
    return CorpusFile(name, size, tuple(rows), offsets, listing.versions.get(name, "")), schema


def _messages(stream, position: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (kind, rows, first byte, byte after the last) of each message. Reads their heads alone.

    Raises:
        ValueError: if the file ends in the middle of a message.
    """
    while position + 8 <= size:
        stream.seek(position)
        head = stream.read(8)
        if head[:4] != CONTINUATION:
            raise ValueError(f"no message begins at byte {position}")
        [length] = struct.unpack("<i", head[4:])
        if length == 0:  # the end of the stream
            return
        if not 0 < length <= size - position - 8:
            raise ValueError(f"it is cut in the message at byte {position}")
        metadata = stream.read(length)
        kind, num_rows, body = _read_message(metadata)
        end = position + 8 + length + body
        if body < 0 or end > size:
            raise ValueError(f"it is cut in the message at byte {position}")
        yield kind, num_rows, position, end
        position = end


def _read_message(metadata: bytes) -> tuple[int, int, int]:
    """(kind, rows, bytes of the body) of the flatbuffer in front of a message (Message.fbs in the Arrow format)."""
    [message] = struct.unpack_from("<I", metadata)
    kind = _field(metadata, message, 1, "<B", 0)
    body = _field(metadata, message, 3, "<q", 0)
    place = _place(metadata, message, 2)
    if kind != BATCH_MESSAGE or not place:
        return kind, 0, body
    [offset] = struct.unpack_from("<I", metadata, place)
    return kind, _field(metadata, place + offset, 0, "<q", 0), body


def _place(data: bytes, table: int, index: int) -> int:
    """Where a flatbuffer's table has its field with this index; 0 if it is left out."""
    [back] = struct.unpack_from("<i", data, table)
    fields = table - back
    [size] = struct.unpack_from("<H", data, fields)
    if 4 + 2 * index >= size:
        return 0
    [offset] = struct.unpack_from("<H", data, fields + 4 + 2 * index)
    return table + offset if offset else 0


def _field(data: bytes, table: int, index: int, kind: str, default: int) -> int:
    place = _place(data, table, index)
    return struct.unpack_from(kind, data, place)[0] if place else default


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each row. Memory holds one record batch."""
    assert columns is not None
    source, row, offsets = rows.sources[0], rows.groups.start, rows.groups.offsets
    schema = None
    for num_rows, begin, end in zip(rows.groups.rows, offsets[:-1], offsets[1:], strict=True):
        first, stop = max(rows.start - row, 0), min(rows.stop - row, num_rows)
        if first < stop:
            try:
                schema = schema or _schema(store, source, offsets[0])
                batch = _batch(store, source, begin, end, schema, num_rows)
            except (PickleError, pa.ArrowException) as error:
                reject = Reject("unreadable", f"{source}, rows {row} to {row + num_rows - 1}: {type(error).__name__}")
                yield from (Record(f"{source}#{row + i}", source, row + i, reject) for i in range(first, stop))
            else:
                for i in range(first, stop, SLICE_ROWS):
                    part = batch.slice(i, min(SLICE_ROWS, stop - i))
                    yield from records_of(part, source, row + i, columns, max_bytes)
        row += num_rows


def _schema(store: Store, source: str, first_batch: int) -> pa.Schema:
    """The schema, which stands before the first record batch."""
    with open_range(store, source, 0, first_batch) as stream:
        start = len(MAGIC) if stream.read(len(MAGIC)) == MAGIC else 0
        stream.seek(start)
        return plain_schema(stream.read(2**24)[: first_batch - start])


def _batch(store: Store, source: str, begin: int, end: int, schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    """A record batch, whose offsets lie in its buffers: pyarrow believes them, and would read any memory there.

    Raises:
        pa.ArrowException: if the batch is damaged.
    """
    with open_range(store, source, begin, end) as stream:
        message = pa.ipc.read_message(pa.py_buffer(stream.read(end - begin)))
    # As bytes: text that is not UTF-8 costs its own row alone.
    as_bytes = pa.schema([pa.field(field.name, _bytes_for_text(field.type)) for field in schema])
    pa.ipc.read_record_batch(message, as_bytes).validate(full=True)
    batch = pa.ipc.read_record_batch(message, schema)
    if batch.num_rows != num_rows:
        raise pa.ArrowInvalid(f"the batch must have {num_rows} rows, got {batch.num_rows}")
    return batch


def _bytes_for_text(kind: pa.DataType) -> pa.DataType:
    """The type of equal layout that holds bytes wherever `kind` holds text."""
    for text, plain in ((pa.string(), pa.binary()), (pa.large_string(), pa.large_binary())):
        if kind == text:
            return plain
    if kind == pa.string_view():
        return pa.binary_view()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(part.name, _bytes_for_text(part.type)) for part in kind])
    for test, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if test(kind):
            return make(_bytes_for_text(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_bytes_for_text(kind.value_type), kind.list_size)
    return kind


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    if columns is None or columns.references is None or not rows:
        return {}
    schema, found, row = _schema(store, file.source, file.offsets[0]), {}, 0
    for num_rows, begin, end in zip(file.row_groups, file.offsets[:-1], file.offsets[1:], strict=True):
        wanted = [number - row for number in rows if row <= number < row + num_rows]
        if wanted and columns.references in schema.names:
            column = _batch(store, file.source, begin, end, schema, num_rows).column(columns.references)
            found |= {row + number: texts for number, texts in references_of(column, wanted).items()}
        row += num_rows
    return found


FORMAT = Format(
    name="arrow",
    title="Arrow",
    one_image_a_file=False,
    recognises=is_arrow,
    files=find_files,
    records=read_records,
    references=read_references,
)
