"""The images of single rows of a corpus as URLs, for a model behind an endpoint."""

import base64
import time
from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa

from pipelines.corpus.fetch import Fetched, Fetcher, FetchSettings, fetcher_of
from pipelines.corpus.file import CorpusFile, ReadRange, RowGroups, covering
from pipelines.corpus.find import Corpus
from pipelines.corpus.format import InStore
from pipelines.images.formats import format_of
from pipelines.store import STORE_ERRORS

KNOWN = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}  # what endpoints take
MAX_BYTES = 8 << 20
FETCH_SECONDS = 10.0  # for one image behind an address


def picture_urls(
    corpus: Corpus, images: Iterable[tuple[str, int]], seconds: float, fetching: FetchSettings
) -> dict[tuple[str, int], str]:
    """A data URL for each image (source, row) that is of a common format and at most 8 MiB large.

    Others are left out, as are images that cannot be read, and what is left after so many `seconds`.
    """
    files, urls = {file.source: file for file in corpus.files}, {}
    deadline = time.monotonic() + seconds
    fetcher = fetcher_of(corpus.store, replace(fetching, timeout=min(seconds, FETCH_SECONDS)), MAX_BYTES)
    for image in dict.fromkeys(images):
        if image[0] not in files or time.monotonic() >= deadline:
            continue
        try:
            data = _read(corpus, files[image[0]], image[1], fetcher)
        except (*STORE_ERRORS, pa.ArrowException):
            continue
        if isinstance(data, bytes) and len(data) <= MAX_BYTES and (kind := KNOWN.get(format_of(data) or "")):
            urls[image] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return urls


def _read(corpus: Corpus, file: CorpusFile, row: int, fetcher: Fetcher) -> Fetched:
    """The encoded image of a row."""
    groups = next(covering(file, [(row, row + 1)])) if file.row_groups else RowGroups()
    rows = ReadRange((file.source,), row, row + 1, groups)
    [record] = corpus.format.records(corpus.store, rows, corpus.columns, max_bytes=MAX_BYTES, with_references=False)
    return fetcher.fetch(record.data) if isinstance(record.data, str | InStore) else record.data
