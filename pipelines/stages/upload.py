"""Pictures to where they are encoded, one batch ahead of the one that is being encoded.

Copying a batch from the object store costs its host copy into pinned memory and then the bus. Both happen on a thread
and a CUDA stream of their own while the batch before is on the GPU, which waits for neither. On a CPU there is nothing
to copy to and nothing to overlap: a batch is taken out of the unit when its turn comes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Arrived = Callable[[], Tensor]
"""Gives the batch, ready for the caller's next operation."""


class Uploader:
    """Batches of the rows of `pixels`, uint8 [rows, ...], by `copy`; without it, where they are.

    A context manager, as it may hold a thread.
    """

    def __init__(self, pixels: Tensor, copy: Callable[[Tensor, Sequence[int]], Arrived] | None):
        self.pixels, self._copy = pixels, copy
        self._thread = ThreadPoolExecutor(1) if copy else None
        self._coming: dict[tuple[int, ...], Future[Arrived]] = {}

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._thread.shutdown()

    def ahead(self, indices: Sequence[int]) -> None:
        """Begins to copy these rows, which are asked for soon: as a rule after the batch that is asked for next."""
        if self._thread and self._copy and tuple(indices) not in self._coming:
            self._coming[tuple(indices)] = self._thread.submit(self._copy, self.pixels, list(indices))

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """The rows, on the device.

        Raises:
            whatever copying them ran into, such as torch.OutOfMemoryError.
        """
        if self._copy is None:
            return self.pixels[list(indices)]
        coming = self._coming.pop(tuple(indices), None)
        return (coming.result() if coming else self._copy(self.pixels, indices))()


class CudaCopy:
    """Through pinned memory, on a stream of its own."""

    def __init__(self, device: str):
        self.device, self.stream = torch.device(device), torch.cuda.Stream(device)

    def __call__(self, pixels: Tensor, indices: Sequence[int]) -> Arrived:
        pinned = torch.empty(len(indices), *pixels.shape[1:], dtype=pixels.dtype, pin_memory=True)
        torch.index_select(pixels, 0, torch.tensor(indices), out=pinned)
        with torch.cuda.stream(self.stream):
            copied = pinned.to(self.device, non_blocking=True)  # torch keeps `pinned` until the copy is done
            done = self.stream.record_event()

        def arrived() -> Tensor:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            copied.record_stream(stream)  # its memory was allocated for the other stream
            return copied

        return arrived
