"""The rows of a piece with their encoded images."""

import hashlib
from collections.abc import Iterator

from pipelines.corpus.file import ReadRange, covering
from pipelines.corpus.find import Corpus
from pipelines.errors import JobFailedError, UserError
from pipelines.export.captions import Captioned, rows_of_file, rows_of_images
from pipelines.export.pieces import Piece
from pipelines.images.formats import format_of
from pipelines.store import Store, in_threads

SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of other formats: the name in lower case

Row = tuple[Captioned, bytes | None]


def rows_of(piece: Piece, output: Store) -> Iterator[Captioned]:
    """The rows of a piece, in order."""
    if piece.file is None:
        return rows_of_images(output, piece.parts)
    return rows_of_file(output, piece.file.source, piece.parts, piece.start, piece.stop)


def rows_with_images(piece: Piece, corpus: Corpus, output: Store, max_bytes: int, keep: bool) -> Iterator[Row]:
    """Yields the rows of a piece with their encoded images; None for a row without bytes. Without `keep`, only
    captioned rows.

    Raises:
        UserError: if the corpus holds addresses instead of images.
        JobFailedError: if an image is not the one that was captioned.
    """
    rows = (row for row in rows_of(piece, output) if keep or row.captions or piece.file is not None)
    images = _of_files(corpus, rows) if piece.file is None else _of_rows(piece, corpus, rows, max_bytes)
    for row, data in images:
        if not keep and not row.captions:
            continue
        if row.captions and (data is None or hashlib.sha256(data).hexdigest() != row.sha256):
            raise JobFailedError(f"{row.source} row {row.row} has another image than the one that was captioned")
        yield row, data


def suffix_of(data: bytes) -> str:
    """The suffix of an encoded image's format, without its dot."""
    kind = format_of(data)
    return "bin" if kind is None else SUFFIXES.get(kind, kind.lower())


def _of_files(corpus: Corpus, rows: Iterator[Captioned]) -> Iterator[Row]:
    def read(row: Captioned) -> Row:
        try:
            return row, corpus.store.read(row.source)
        except FileNotFoundError:
            return row, None

    return in_threads(read, rows)


def _of_rows(piece: Piece, corpus: Corpus, rows: Iterator[Captioned], max_bytes: int) -> Iterator[Row]:
    assert piece.file is not None
    [groups] = covering(piece.file, [(piece.start, piece.stop)])
    records = corpus.format.records(
        corpus.store,
        ReadRange((piece.file.source,), piece.start, piece.stop, groups),
        corpus.columns,
        max_bytes=max_bytes,
        with_references=False,
    )
    for row, record in zip(rows, records, strict=True):
        if isinstance(record.data, str):
            raise UserError(
                "export: the corpus holds addresses instead of images, which are not fetched again; "
                "export.images=false leaves them out, export.format=parquet adds the captions to its columns"
            )
        row.id = row.id or record.id
        yield row, record.data if isinstance(record.data, bytes) else None
