"""Copies the next batch of pictures to the GPU while the present batch is being encoded.

A batch from the object store is first copied into pinned memory on the host and then over the bus. A thread and a CUDA
stream of their own do both copies while the GPU encodes the batch before, so the GPU waits for neither. On a CPU there
is nothing to copy and nothing to overlap: the rows of a batch are indexed when its turn comes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Arrived = Callable[[], Tensor]
"""Returns the values of the batch on the device, one row after the other. The caller's current stream waits for the
copy; the caller itself does not."""


class Uploader:
    """Batches of the rows of a ragged array. Without `copy` the batches stay on the host.

    A context manager: its end waits for the thread that copies.
    """

    def __init__(self, pixels: Sequence[Tensor], copy: Callable[[Sequence[Tensor]], Arrived] | None):
        """`pixels` holds the rows, uint8 [length] each."""
        self.pixels, self._copy = pixels, copy
        self._thread = ThreadPoolExecutor(1) if copy else None
        self._copying: dict[tuple[int, ...], Future[Arrived]] = {}  # copies begun by `ahead`, by indices of rows

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._thread.shutdown()

    def ahead(self, indices: Sequence[int]) -> None:
        """Begins to copy these rows, which the caller will soon ask for. Does nothing without `copy`."""
        if self._thread and self._copy and tuple(indices) not in self._copying:
            self._copying[tuple(indices)] = self._thread.submit(self._copy, self._rows(indices))

    def __call__(self, indices: Sequence[int]) -> list[Tensor]:
        """The rows, on the device.

        Raises:
            any error of the copy, such as torch.OutOfMemoryError.
        """
        rows = self._rows(indices)
        if self._copy is None:
            return rows
        # `ahead` never announced the first batch, nor the first half of a failed one: these are copied now.
        copying = self._copying.pop(tuple(indices), None)
        copied = (copying.result() if copying else self._copy(rows))()
        return list(copied.split([len(row) for row in rows]))

    def _rows(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.pixels[i] for i in indices]


class CudaCopy:
    """Copies rows to a GPU through pinned memory, on a CUDA stream of its own."""

    def __init__(self, device: str):
        self.device, self.stream = torch.device(device), torch.cuda.Stream(device)

    def __call__(self, rows: Sequence[Tensor]) -> Arrived:
        pinned = torch.empty(sum(map(len, rows)), dtype=rows[0].dtype, pin_memory=True)
        torch.cat(list(rows), out=pinned)
        with torch.cuda.stream(self.stream):
            # torch keeps the memory of `pinned` from reuse until the copy is done, though `pinned` goes out of scope.
            copied = pinned.to(self.device, non_blocking=True)
            done = self.stream.record_event()

        def arrived() -> Tensor:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            # The memory of `copied` belongs to the copy stream. Without this call the allocator could hand it to the
            # next copy while `stream` still reads it.
            copied.record_stream(stream)
            return copied

        return arrived
