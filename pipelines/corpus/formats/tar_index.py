"""Where a reader may start in each tar shard. A shard is read for this once; a cache keeps the answer."""

import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.formats.tar_samples import NO_IMAGE, is_compressed, open_shard, read_samples
from pipelines.corpus.listing import Listing
from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store, in_threads

logger = logging.getLogger(__name__)

GROUP_ROWS, GROUP_BYTES = 64, 2**24  # a reader may start after this many rows, or this many bytes
SAVE_SECONDS = 60.0  # between two saves of a cache that grows, so that an interrupted plan goes on
SAY_SECONDS = 10.0
NO_TAR = "files that are no tar files"
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("rows", pa.list_(pa.int32())),
        ("offsets", pa.list_(pa.int64())),
        ("left_out", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The stretches of a shard that a reader may start at."""

    rows: tuple[int, ...]  # of each
    offsets: tuple[int, ...]  # byte at which each begins, then the size of the file
    left_out: Mapping[str, int] = field(default_factory=dict)  # what is no row, by reason


def index_shards(listing: Listing, names: Sequence[str], image: str) -> list[ShardIndex]:
    """The indices of the shards, in order: those that the cache knows of unchanged files, and new ones.

    Raises:
        UserError: if a shard cannot be read at all.
    """
    cache_name = _cache_name(listing.store, image)
    known = _load(listing.cache, cache_name) if listing.cache else {}
    fresh = {name: _identity(listing, name) for name in names}
    missing = [name for name in names if not fresh[name][1] or known.get(name, (None,))[0] != fresh[name]]
    if not missing:
        return [known[name][1] for name in names]
    if len(missing) > 1:
        logger.info("%d tar files have to be read once to be planned (input.cache keeps what is found)", len(missing))

    def index(name: str) -> ShardIndex:
        try:
            return index_shard(listing.store, name, listing.sizes[name], image)
        except STORE_ERRORS as error:
            raise UserError(f"{name} cannot be read: {type(error).__name__}: {error}") from error

    said = saved = time.monotonic()
    try:
        for count, (name, found) in enumerate(zip(missing, in_threads(index, missing), strict=True), 1):
            known[name] = (fresh[name], found)
            if time.monotonic() - said > SAY_SECONDS:
                logger.info("read %d of %d tar files", count, len(missing))
                said = time.monotonic()
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(listing.cache, cache_name, known)
                saved = time.monotonic()
    finally:
        _save(listing.cache, cache_name, known)
    return [known[name][1] for name in names]


def index_shard(store: Store, name: str, size: int, image: str) -> ShardIndex:
    """Reads the headers of a shard. `image` is the suffix of the image in a sample, or auto."""
    rows, offsets, left_out = [0], [0], Counter()
    packed = is_compressed(name)
    with open_shard(store, name, 0, size) as (stream, stop):
        num_samples = 0
        for sample in read_samples(stream, stop, image, left_out=left_out):
            num_samples += 1
            if not packed and rows[-1] and (rows[-1] >= GROUP_ROWS or sample.offset - offsets[-1] >= GROUP_BYTES):
                offsets.append(sample.offset)
                rows.append(0)
            rows[-1] += sample.image is not None
            left_out[NO_IMAGE] += sample.image is None
    if not rows[-1]:  # samples without an image at the end belong to the stretch before them
        rows.pop()
        offsets.pop()
    if not num_samples and (left_out or not size):
        left_out = Counter({NO_TAR: 1})
    counts = {reason: count for reason, count in left_out.items() if count}
    return ShardIndex(tuple(rows), (*offsets, size) if rows else (), counts)


Known = dict[str, tuple[tuple[int, str], ShardIndex]]
"""Name of a shard -> (its size and version when it was read, its index)."""


def _identity(listing: Listing, name: str) -> tuple[int, str]:
    return listing.sizes[name], listing.versions.get(name, "")


def _cache_name(store: Store, image: str) -> str:
    text = "\0".join((store.path, store.endpoint_url or "", image, f"{GROUP_ROWS} {GROUP_BYTES}"))
    return f"tar-{hashlib.sha256(text.encode()).hexdigest()[:16]}.parquet"


def _load(cache: Store, name: str) -> Known:
    try:
        table = pq.read_table(io.BytesIO(cache.read(name)), schema=SCHEMA)
    except FileNotFoundError:
        return {}
    except (*STORE_ERRORS, pa.ArrowException) as error:
        logger.warning("the cache %s/%s is not used: %s", cache.path, name, error)
        return {}
    columns = (table[field.name].to_pylist() for field in SCHEMA)
    return {
        shard: ((size, version), ShardIndex(tuple(rows), tuple(offsets), json.loads(left_out)))
        for shard, size, version, rows, offsets, left_out in zip(*columns, strict=True)
    }


def _save(cache: Store | None, name: str, known: Known) -> None:
    """Keeps the indices of files whose change would show. A cache that cannot be written costs time alone."""
    if cache is None:
        return
    rows = [_to_row(shard, *entry) for shard, entry in known.items() if entry[0][1]]
    pq.write_table(_table(rows), stream := io.BytesIO(), compression="zstd")
    try:
        cache.write(name, stream.getvalue())
    except (*STORE_ERRORS, UserError) as error:
        logger.warning("the index of the tar files is not kept: input.cache %s: %s", cache.path, error)


def _table(rows: Iterable[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _to_row(name: str, identity: tuple[int, str], index: ShardIndex) -> tuple:
    return (name, *identity, list(index.rows), list(index.offsets), json.dumps(dict(index.left_out)))
