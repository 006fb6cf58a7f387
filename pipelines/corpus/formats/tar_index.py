"""Where a reader may start in each tar shard. A shard is read for this once; a cache keeps the answer."""

from collections import Counter
from collections.abc import Sequence

from pipelines.corpus.formats.tar_samples import NO_IMAGE, is_compressed, open_shard, read_samples
from pipelines.corpus.index_cache import FileIndex, index_files
from pipelines.corpus.listing import Listing
from pipelines.store import Store

GROUP_ROWS, GROUP_BYTES = 64, 2**24  # a reader may start after this many rows, or this many bytes
NO_TAR = "files that are no tar files"
TITLE = "tar"


def settings(image: str) -> tuple[object, ...]:
    """What the index of a shard depends on."""
    return image, GROUP_ROWS, GROUP_BYTES


def index_shards(listing: Listing, names: Sequence[str], image: str) -> list[FileIndex]:
    """The indices of the shards, in order; their notes count by reason what is no row.

    Raises:
        UserError: if a shard cannot be read at all.
    """

    def index(name: str) -> FileIndex:
        return index_shard(listing.store, name, listing.sizes[name], image)

    return index_files(listing, names, index, title=TITLE, settings=settings(image))


def index_shard(store: Store, name: str, size: int, image: str) -> FileIndex:
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
    return FileIndex(tuple(rows), (*offsets, size) if rows else (), counts)
