"""Where a reader may start in files that have to be read to be planned. A cache keeps what was found of each file."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.listing import Listing
from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store, in_threads

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two saves of a cache that grows, so that an interrupted plan goes on
SAY_SECONDS = 10.0
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("rows", pa.list_(pa.int32())),
        ("offsets", pa.list_(pa.int64())),
        ("note", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class FileIndex:
    """The stretches of a file that a reader may start at."""

    rows: tuple[int, ...]  # of each
    offsets: tuple[int, ...]  # byte at which each begins, then where the last ends
    note: Any = None  # what else the format learned of the file, as JSON has it


Known = dict[str, tuple[tuple[int, str], FileIndex]]
"""Name of a file -> (its size and version when it was read, its index)."""


def index_files(
    listing: Listing, names: Sequence[str], index: Callable[[str], FileIndex], *, title: str, settings: Sequence[object]
) -> list[FileIndex]:
    """The indices of the files, in order: those that the cache knows of unchanged files, and new ones.

    Args:
        index: reads a file.
        title: what messages call the files.
        settings: what else an index depends on.

    Raises:
        UserError: if a file cannot be read at all.
    """
    cache_name = name_in_cache(listing.store, title, settings)
    known = _load(listing.cache, cache_name) if listing.cache else {}
    fresh = {name: (listing.sizes[name], listing.versions.get(name, "")) for name in names}
    missing = [name for name in names if not fresh[name][1] or known.get(name, (None,))[0] != fresh[name]]
    if not missing:
        return [known[name][1] for name in names]
    if len(missing) > 1:
        logger.info("%d %s files are read once to be planned (input.cache keeps what is found)", len(missing), title)

    def read(name: str) -> FileIndex:
        try:
            return index(name)
        except STORE_ERRORS as error:
            raise UserError(f"{name} cannot be read: {type(error).__name__}: {error}") from error

    said = saved = time.monotonic()
    try:
        for count, (name, found) in enumerate(zip(missing, in_threads(read, missing), strict=True), 1):
            known[name] = (fresh[name], found)
            if time.monotonic() - said > SAY_SECONDS:
                logger.info("read %d of %d %s files", count, len(missing), title)
                said = time.monotonic()
            if time.monotonic() - saved > SAVE_SECONDS:
                save(listing.cache, cache_name, known)
                saved = time.monotonic()
    finally:
        save(listing.cache, cache_name, known)
    return [known[name][1] for name in names]


def name_in_cache(store: Store, title: str, settings: Sequence[object]) -> str:
    """The file of the cache that keeps the indices of a corpus."""
    text = json.dumps([store.path, store.endpoint_url, *settings])
    return f"{title.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"


def _load(cache: Store, name: str) -> Known:
    try:
        table = pq.read_table(io.BytesIO(cache.read(name)), schema=SCHEMA)
        columns = (table[field.name].to_pylist() for field in SCHEMA)
        return {
            file: ((size, version), FileIndex(tuple(rows), tuple(offsets), json.loads(note)))
            for file, size, version, rows, offsets, note in zip(*columns, strict=True)
        }
    except FileNotFoundError:
        return {}
    except (*STORE_ERRORS, pa.ArrowException, TypeError) as error:  # TypeError: nulls in a foreign file
        logger.warning("the cache %s/%s is not used: %s", cache.path, name, error)
        return {}


def save(cache: Store | None, name: str, known: Known) -> None:
    """Keeps the indices of files whose change would show. A cache that cannot be written costs time alone."""
    if cache is None:
        return
    rows = [_to_row(file, *entry) for file, entry in known.items() if entry[0][1]]
    pq.write_table(_table(rows), stream := io.BytesIO(), compression="zstd")
    try:
        cache.write(name, stream.getvalue())
    except (*STORE_ERRORS, UserError) as error:
        logger.warning("what is known of the files is not kept: input.cache %s: %s", cache.path, error)


def _table(rows: Iterable[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _to_row(name: str, identity: tuple[int, str], index: FileIndex) -> tuple:
    return (name, *identity, list(index.rows), list(index.offsets), json.dumps(index.note))
