"""Runs batches on a device, halves a failed batch down to the guilty images, and tells these from a broken actor."""

import time
from collections.abc import Callable, Collection

import torch

from pipelines.stages.gpu import exit_if_cuda_is_broken

SYSTEMATIC = 8  # if this many images all fail, the images are not at fault
OOM_WAITS = (0.5, 2.0)  # seconds to wait before each retry of a single image for which the GPU had no memory


class Suspicion:
    """Tells a broken actor from broken images, over all units of the actor.

    An actor whose first SYSTEMATIC images all fail is itself broken: it raises instead of quarantining them. One unit
    may be smaller than SYSTEMATIC, so the count goes on from unit to unit.
    """

    def __init__(self) -> None:
        self._works, self._failures = False, 0  # whether any image has succeeded yet; number of failed images

    def note(self, num_right: int, errors: Collection[BaseException]) -> None:
        """Counts the images of a unit: `num_right` succeeded, and each of `errors` is of one that failed.

        Raises:
            one of `errors`, if the actor is broken.
        """
        self._works |= num_right > 0
        self._failures += len(errors)
        if errors and not self._works and self._failures >= SYSTEMATIC:
            raise next(iter(errors))


def run_batched(
    indices: list[int],
    batch_size: int,
    run: Callable[[list[int]], None],
    ahead: Callable[[list[int]], None] = lambda indices: None,
) -> dict[int, Exception]:
    """`run_batches` for batches of at most `batch_size` of the `indices`."""
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return run_batches(batches, run, ahead)


def run_batches(
    batches: list[list[int]],
    run: Callable[[list[int]], None],
    ahead: Callable[[list[int]], None] = lambda indices: None,
) -> dict[int, Exception]:
    """Calls `run` on batches of indices and returns the errors of the images that fail, by index.

    A failed batch is halved and run again, down to single images. The batches run in reverse order. Before a batch
    runs, `ahead` is called with the batch that follows it.

    Raises:
        the last error, if there are SYSTEMATIC images or more and all of them failed, or if SYSTEMATIC single images
            found no memory on the GPU: in both cases the images are not at fault.
    """
    failed: dict[int, Exception] = {}
    # A stack: the halves of a failed batch run next, while the batches of full size wait.
    todo, num_indices = list(batches), sum(map(len, batches))
    waits, num_out_of_memory = iter(OOM_WAITS), 0  # the waits are shared by all images of the call
    while todo:
        batch = todo.pop()
        if todo:
            ahead(todo[-1])
        try:
            run(batch)
        except Exception as error:
            exit_if_cuda_is_broken(error)
            error = error.with_traceback(None)  # the frames of a traceback would keep the tensors of the batch alive
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                if len(batch) == 1 and (seconds := next(waits, None)) is not None:
                    time.sleep(seconds)  # another process on the same GPU may free memory meanwhile
                    todo.append(batch)
                    continue
                num_out_of_memory += len(batch) == 1
                if num_out_of_memory == SYSTEMATIC:
                    raise error
            if len(batch) == 1:
                failed[batch[0]] = error
                if len(failed) == num_indices >= SYSTEMATIC:
                    raise error
            else:
                half = len(batch) // 2
                todo += [batch[half:], batch[:half]]
    return failed
