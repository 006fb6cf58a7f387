"""The rows of a piece with their encoded images."""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from pipelines.corpus.fault import FetchFault
from pipelines.corpus.fetch import Fetched, Fetcher, is_web
from pipelines.corpus.file import ReadRange, covering
from pipelines.corpus.find import Corpus
from pipelines.corpus.format import InStore, Record
from pipelines.errors import JobFailedError
from pipelines.export.captions import Captioned, rows_of_file, rows_of_images
from pipelines.export.pieces import Piece
from pipelines.images.formats import format_of
from pipelines.store import Store

logger = logging.getLogger(__name__)

SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of other formats: the name in lower case

Row = tuple[Captioned, bytes | None]


def rows_of(piece: Piece, output: Store) -> Iterator[Captioned]:
    """The rows of a piece, in order."""
    if piece.file is None:
        return rows_of_images(output, piece.parts)
    return rows_of_file(output, piece.file.source, piece.parts, piece.start, piece.stop)


def rows_with_images(piece: Piece, corpus: Corpus, output: Store, fetcher: Fetcher, keep: bool) -> Iterator[Row]:
    """Yields the rows of a piece with their encoded images; None for a row without. Without `keep`, only rows with both
    captions and image.

    What is gone from the web, or is something else there by now, is counted in a warning.

    Raises:
        JobFailedError: if a file of the corpus is not the image that was captioned, or a fetch may succeed later.
    """
    num_gone = 0
    for row, target, data in _fetched(piece, corpus, output, fetcher, keep):
        if isinstance(data, FetchFault) and data.passing:
            raise JobFailedError(f"the image of {row.source} row {row.row} cannot be fetched now: {data.detail}")
        if row.captions and (not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != row.sha256):
            if not is_web(target):
                raise JobFailedError(f"{row.source} row {row.row} has another image than the one that was captioned")
            num_gone, data = num_gone + 1, None
        if keep or (row.captions and data is not None):
            yield row, data if isinstance(data, bytes) else None
    if num_gone:
        done = "written without them" if keep else "left out"
        logger.warning("%s: %d images are gone from the web or have changed; rows %s", piece.name, num_gone, done)


def suffix_of(data: bytes) -> str:
    """The suffix of an encoded image's format, without its dot."""
    kind = format_of(data)
    return "bin" if kind is None else SUFFIXES.get(kind, kind.lower())


def _fetched(
    piece: Piece, corpus: Corpus, output: Store, fetcher: Fetcher, keep: bool
) -> Iterator[tuple[Captioned, str | InStore, Fetched]]:
    """Yields each row of a piece that may be written with its image, and what names it (empty: the row itself)."""
    waiting: deque[tuple[Captioned, str | InStore]] = deque()

    def records() -> Iterator[Record]:
        for row, record in _records(piece, corpus, rows_of(piece, output), fetcher.max_bytes):
            if not row.captions and not keep:
                continue
            row.id = row.id or record.id
            target = record.data if isinstance(record.data, str | InStore) else ""
            if isinstance(record.data, str) and not row.captions:  # the caption job could not fetch it
                record = replace(record, data=None)
            waiting.append((row, target))
            yield record

    for _, data in fetcher.load(records()):
        yield *waiting.popleft(), data


def _records(
    piece: Piece, corpus: Corpus, rows: Iterator[Captioned], max_bytes: int
) -> Iterator[tuple[Captioned, Record]]:
    if piece.file is None:
        yield from ((row, Record(row.source, row.source, row.row, InStore(row.source))) for row in rows)
        return
    [groups] = covering(piece.file, [(piece.start, piece.stop)])
    span = ReadRange((piece.file.source,), piece.start, piece.stop, groups)
    found = corpus.format.records(corpus.store, span, corpus.columns, max_bytes=max_bytes, with_references=False)
    yield from zip(rows, found, strict=True)
