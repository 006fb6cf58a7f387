"""The formats of rows as text: JSONL and CSV files whose rows name images by their addresses.

A file is read once to be planned, to learn where its rows begin, which a cache keeps; a reader starts at every
GROUP_ROWS-th row. A row that is no JSON object, or no line of CSV, has no values, so its image counts as missing.
"""

import base64
import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from pipelines.corpus.columns import ColumnChoice, Columns, check_alike, find_columns, merge_schemas, partitions_of
from pipelines.corpus.file import CorpusFile, ReadRange, covering
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.formats.rows import address_of, as_list, id_of, with_base
from pipelines.corpus.index_cache import FileIndex, index_files
from pipelines.corpus.listing import Listing
from pipelines.corpus.ranged import open_range
from pipelines.errors import UserError
from pipelines.store import Store

GROUP_ROWS = 128  # a reader may start after this many rows
PEEKED_ROWS = 100  # of each file, whose columns are those of the corpus
MAX_VALUE = 2**27  # characters of one value in CSV; addresses may hold a whole image in base64
BOM = "\ufeff"
TITLE = "text"  # of the index in the cache

Values = dict[str, Any]


def is_jsonl(name: str) -> bool:
    """Whether a file's name ends in the suffix of JSON lines."""
    return name.lower().endswith((".jsonl", ".ndjson"))


def is_csv(name: str) -> bool:
    """Whether a file's name ends in the suffix of a table of text."""
    return name.lower().endswith((".csv", ".tsv"))


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The files that have rows, with the places at which a reader may start, and the columns to read.

    Raises:
        UserError: if a file cannot be read, there is no column of addresses, or no row.
    """
    settings = (GROUP_ROWS, PEEKED_ROWS)
    indices = index_files(
        listing,
        names,
        lambda name: index_lines(listing.store, name, listing.sizes[name]),
        title=TITLE,
        settings=settings,
    )
    known = {name: index for name, index in zip(names, indices, strict=True) if index.rows}
    files = [_file(listing, name, index) for name, index in known.items()]
    if not files:
        raise UserError(f"input.path must hold addresses of images, found {len(names)} files without rows: {names[0]}")
    schemas = {name: pa.ipc.read_schema(pa.py_buffer(base64.b64decode(index.note))) for name, index in known.items()}
    merged = merge_schemas(schemas.values())
    partitions = dict.fromkeys(column for name in names for column in partitions_of(name))
    columns = find_columns(merged, choice, tuple(partitions))
    for name, schema in schemas.items():
        check_alike(name, schema, merged, columns)
    columns = with_base(columns, JSONL, listing, files)
    empty = len(names) - len(files)
    return Found(files, columns, {"files without rows": empty} if empty else {})


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each row, from one ranged read."""
    assert columns is not None
    source = rows.sources[0]
    for row, values in _numbered(store, rows):
        if columns.partitions:
            values = values | partitions_of(source)
        address = values.get(columns.image)
        yield Record(
            id=id_of(values.get(columns.id) if columns.id else None, f"{source}#{row}"),
            source=source,
            row=row,
            data=address_of(str(address), source, columns) if address else None,
            fields={name: values.get(name) for name in columns.fields},
            references=as_list(values.get(columns.references)) if with_references and columns.references else [],
        )


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    if columns is None or columns.references is None or not rows:
        return {}
    first, stop = min(rows), max(rows) + 1
    [groups] = covering(file, [(first, stop)])
    found = {}
    for row, values in _numbered(store, ReadRange((file.source,), first, stop, groups)):
        if row in rows and (texts := [text for text in as_list(values.get(columns.references)) if text]):
            found[row] = texts
    return found


def index_lines(store: Store, name: str, size: int) -> FileIndex:
    """The places at which a reader may start; the note is the schema of the first rows."""
    rows, offsets, peeked = [0], [0], []
    with open_range(store, name, 0, size) as stream:
        for offset, values in _parse(stream, name, []):
            if rows[-1] == GROUP_ROWS:
                rows.append(0)
                offsets.append(offset)
            rows[-1] += 1
            if len(peeked) < PEEKED_ROWS:
                peeked.append(values)
    if not rows[-1]:
        return FileIndex((), ())
    schema = base64.b64encode(_schema(peeked).serialize()).decode()
    return FileIndex(tuple(rows), (*offsets, size), schema)


def _file(listing: Listing, name: str, index: FileIndex) -> CorpusFile:
    return CorpusFile(name, listing.sizes[name], index.rows, index.offsets, listing.versions.get(name, ""))


def _numbered(store: Store, rows: ReadRange) -> Iterator[tuple[int, Values]]:
    """Yields (row, values) for a range of rows."""
    source, groups = rows.sources[0], rows.groups
    header: list[str] = []
    if is_csv(source) and groups.offsets[0]:  # else the header is the first line of the range
        with open_range(store, source, 0, groups.offsets[0]) as stream:
            header = _header(next(_split_csv(stream, source))[1])
    with open_range(store, source, groups.offsets[0], groups.offsets[-1]) as stream:
        for row, (_, values) in enumerate(_parse(stream, source, header), groups.start):
            if row >= rows.stop:
                return
            if row >= rows.start:
                yield row, values


def _parse(stream: IO[bytes], name: str, header: list[str]) -> Iterator[tuple[int, Values]]:
    """Yields (byte at which the row begins, its values), from where the stream stands.

    Args:
        header: names of the columns of a CSV file; empty if the first line holds them.
    """
    if not is_csv(name):
        yield from ((offset, _object(line)) for offset, line in _lines(stream) if line.strip())
        return
    for offset, cells in _split_csv(stream, name):
        if not header:
            header = _header(cells)
        elif cells is None or len(cells) != len(header):
            yield offset, {}
        else:
            yield offset, {column: cell or None for column, cell in zip(header, cells, strict=True)}


def _header(cells: list[str] | None) -> list[str]:
    """The names of the columns of a CSV file, from its first row."""
    return [cell.removeprefix(BOM).strip() for cell in cells or []]


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    offset = stream.tell()
    for line in stream:
        yield offset, line.decode(errors="replace")
        offset += len(line)


def _object(line: str) -> Values:
    try:
        values = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _split_csv(stream: IO[bytes], name: str) -> Iterator[tuple[int, list[str] | None]]:
    """Yields (byte at which a row begins, its cells, or None if it is no CSV); lines without anything are no rows."""
    csv.field_size_limit(MAX_VALUE)
    begin = end = stream.tell()

    def lines() -> Iterator[str]:
        nonlocal end
        for line in stream:
            end += len(line)
            yield line.decode(errors="replace")

    source = lines()
    first = next(source, "")
    delimiter = "\t" if name.lower().endswith(".tsv") else ";" if ";" in first and "," not in first else ","
    reader = csv.reader(itertools.chain([first], source), delimiter=delimiter)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells = None
        if cells is None or cells:
            yield begin, cells
        begin = end


def _schema(rows: Sequence[Values]) -> pa.Schema:
    """The columns of the first rows of a file."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, _type([row.get(name) for row in rows])) for name in names])


def _type(values: Sequence[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError):  # of different types
        return pa.string()


def _format(name: str, title: str, recognises: Any) -> Format:
    return Format(
        name=name,
        title=title,
        one_image_a_file=False,
        recognises=recognises,
        files=find_files,
        records=read_records,
        references=read_references,
    )


JSONL = _format("jsonl", "JSONL", is_jsonl)
CSV = _format("csv", "CSV", is_csv)
