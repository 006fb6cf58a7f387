"""A file of a store as a stream for pyarrow, which reads only the ranges that will be needed, by few large requests.

A fault of the store is a `FetchFault`, so it is told from damaged content, for which pyarrow has exceptions of its own.
"""

import io
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from botocore.exceptions import BotoCoreError, ClientError

from pipelines.corpus.fault import FetchFault, fault_of
from pipelines.corpus.fetch import regular_size
from pipelines.corpus.listing import VERSION_KEYS
from pipelines.store import Store

BLOCK_BYTES = 8 * 2**20  # of one request
BLOCKS = 4  # blocks that are held: pyarrow reads the chunks of several columns side by side
GAP_BYTES = 2**16  # ranges that lie no further apart are read together
TRIES, FIRST_WAIT = 4, 0.5  # of one request; the upper end of the random wait before the second try, in seconds

Out = TypeVar("Out")


class RangeFile(io.RawIOBase):
    """A file of a store, read-only. `wanted` limits how far a request reads ahead.

    Raises:
        FetchFault: also by each read, if the store does not give the file, in several tries if the fault is passing.
    """

    def __init__(self, store: Store, name: str, size: int | None = None):
        super().__init__()
        self.store, self.path = store, store.join(name)
        self.wanted: list[tuple[int, int]] = []
        self.version: Any = None  # changes with the file; None if the caller knew the size
        if size is None:
            info = _tried(self._info)
            self.size = int(info["size"])
            self.version = (self.size, *(str(info[name]) for name in VERSION_KEYS if name in info))
        else:
            self.size = size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()  # by the first byte

    def want(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Sets the ranges [start, stop) of bytes that will be read."""
        self.wanted = []
        for start, stop in sorted(ranges):
            if self.wanted and start - self.wanted[-1][1] <= GAP_BYTES:
                self.wanted[-1] = (self.wanted[-1][0], max(stop, self.wanted[-1][1]))
            else:
                self.wanted.append((start, stop))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        pieces = []
        while self._position < stop:
            pieces.append(self._piece(self._position, stop))
            self._position += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, start: int, stop: int) -> bytes:
        """Some bytes from `start` on, from a block that is held or that is read now."""
        for first, block in self._blocks.items():
            if first <= start < first + len(block):
                self._blocks.move_to_end(first)
                return block[start - first : stop - first]
        end = next((last for first, last in self.wanted if first <= start < last), stop)
        end = max(min(stop, start + BLOCK_BYTES), min(end, start + BLOCK_BYTES))
        block = _tried(lambda: cast(bytes, self.store.fs.cat_file(self.path, start=start, end=end)))
        if not block:
            raise FetchFault("the file became shorter while it was read")
        self._blocks[start] = block
        if len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return block[: stop - start]

    def _info(self) -> dict[str, Any]:
        if self.store.is_local:
            regular_size(self.path, self.store.root)
        return self.store.fs.info(self.path)


def _tried(call: Callable[[], Out]) -> Out:
    """The result of `call`, which is repeated a few times while its fault is a passing one."""
    for attempt in range(TRIES):
        try:
            return call()
        except (OSError, ValueError, BotoCoreError, ClientError) as error:
            fault = fault_of(error)
            if not fault.passing or attempt == TRIES - 1:
                raise fault from error
            time.sleep(max(random.uniform(0, FIRST_WAIT * 2**attempt), fault.retry_after or 0.0))
    raise AssertionError("the last try returns or raises")
