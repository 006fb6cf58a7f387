"""The images of single rows of a corpus as URLs, for a model behind an endpoint."""

import base64
import time
from collections.abc import Iterable

import pyarrow as pa

from pipelines.corpus.fetch import fetch
from pipelines.corpus.file import CorpusFile, ReadRange, RowGroups, covering
from pipelines.corpus.find import Corpus
from pipelines.images.decode import Reject
from pipelines.images.formats import format_of
from pipelines.store import STORE_ERRORS

KNOWN = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}  # what endpoints take
MAX_BYTES = 8 << 20
FETCH_SECONDS = 10.0  # for one image behind a URI


def picture_urls(corpus: Corpus, images: Iterable[tuple[str, int]], seconds: float) -> dict[tuple[str, int], str]:
    """A data URL for each image (source, row) that is of a common format and at most 8 MiB large.

    Others are left out, as are images that cannot be read, and what is left after so many `seconds`.
    """
    files, urls = {file.source: file for file in corpus.files}, {}
    deadline = time.monotonic() + seconds
    for image in dict.fromkeys(images):
        left = deadline - time.monotonic()
        if image[0] not in files or left <= 0:
            continue
        try:
            data = _read(corpus, files[image[0]], image[1], min(left, FETCH_SECONDS))
        except (*STORE_ERRORS, pa.ArrowException):
            continue
        if isinstance(data, bytes) and len(data) <= MAX_BYTES and (kind := KNOWN.get(format_of(data) or "")):
            urls[image] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return urls


def _read(corpus: Corpus, file: CorpusFile, row: int, timeout: float) -> bytes | Reject | None:
    """The encoded image of a row."""
    groups = next(covering(file, [(row, row + 1)])) if file.row_groups else RowGroups()
    rows = ReadRange((file.source,), row, row + 1, groups)
    [record] = corpus.format.records(corpus.store, rows, corpus.columns, max_bytes=MAX_BYTES, with_references=False)
    if isinstance(record.data, str):
        return fetch(record.data, corpus.store, MAX_BYTES, timeout)
    return record.data
