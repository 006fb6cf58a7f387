"""A part of a stored object as a stream that is read in large blocks, each by one request."""

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any, cast

from pipelines.corpus.fetch import open_regular
from pipelines.store import Store

SMALL_BYTES, LARGE_BYTES = 2**16, 2**23  # size of a request after a far jump, and of one that goes on
FAR_BYTES = 2**22  # a jump farther than this is cheaper than reading on: about what a store sends in its latency


@contextlib.contextmanager
def open_range(store: Store, name: str, start: int, stop: int) -> Iterator[IO[bytes]]:
    """A stream of bytes [start, stop) of an object that stands at `start`; a local file may be read beyond `stop`."""
    if store.is_local:
        with open_regular(store.join(name)) as stream:
            stream.seek(start)
            yield stream
    else:
        yield cast(IO[bytes], RangedStream(store, name, start, stop))


class RangedStream(io.RawIOBase):
    """Bytes [start, stop) of an object, under their positions in the whole object. Holds one block.

    Reading on, or jumping less than FAR_BYTES ahead, takes LARGE_BYTES at a time. A farther jump takes SMALL_BYTES,
    because the next jump may be as far: so the headers of a tar file are found between large members.
    """

    def __init__(self, store: Store, name: str, start: int, stop: int):
        self._fs, self._path, self._stop = store.fs, store.join(name), stop
        self._position = self._block_start = start
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stop}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; fewer only at the end of the range."""
        size = max(0, self._stop - self._position) if size < 0 else size
        pieces, missing = [], size
        while missing > 0 and (piece := self._piece(missing)):
            pieces.append(piece)
            missing -= len(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def _piece(self, size: int) -> bytes:
        """Bytes at the position, at most `size`: what the block has of them, or the start of the next block."""
        begin = self._position - self._block_start
        if not 0 <= begin < len(self._block):
            end = self._block_start + len(self._block)
            is_far = not end <= self._position < end + FAR_BYTES
            # The first read of a range goes on, because a range is read from its start to its end.
            wanted = max(size, SMALL_BYTES if is_far else LARGE_BYTES)
            stop = min(self._stop, self._position + min(wanted, LARGE_BYTES))
            if stop <= self._position:
                return b""
            self._block = cast(bytes, self._fs.cat_file(self._path, start=self._position, end=stop))
            self._block_start, begin = self._position, 0
        return self._block[begin : begin + size]
