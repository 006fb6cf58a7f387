"""Batches on a device: halved when they fail, down to the guilty images; and who is to blame."""

import time
from collections.abc import Callable, Collection

import torch

from pipelines.stages.gpu import exit_if_cuda_is_broken

SYSTEMATIC = 8  # when so many images all fail, it is not the images
OOM_WAITS = (0.5, 2.0)  # seconds before one image alone is tried again on a GPU that has no memory left


class Suspicion:
    """Tells a broken stage from broken images over an actor's units, which may be smaller than SYSTEMATIC.

    Who has failed on SYSTEMATIC images before any came out right may not blame them.
    """

    def __init__(self) -> None:
        self._works, self._failures = False, 0

    def note(self, num_right: int, errors: Collection[BaseException]) -> None:
        """Counts the images of a unit.

        Raises:
            one of `errors`, if they are not the images' fault.
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
    """Runs `run` on batches; halves a batch that fails, down to the guilty images, and returns their errors.

    `ahead` is told of the batch after the one that is about to run.

    Raises:
        the last error, if SYSTEMATIC images or more were tried and every one failed, or if for SYSTEMATIC of them there
            was no memory even alone: then they are not to blame.
    """
    failed: dict[int, Exception] = {}
    todo = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    waits, starved = iter(OOM_WAITS), 0
    while todo:
        batch = todo.pop()
        if todo:
            ahead(todo[-1])
        try:
            run(batch)
        except Exception as error:
            exit_if_cuda_is_broken(error)
            error = error.with_traceback(None)  # whose frames would keep the batch's tensors
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
                if len(batch) == 1 and (seconds := next(waits, None)) is not None:
                    time.sleep(seconds)  # a neighbour on the GPU may be done with its own by then
                    todo.append(batch)
                    continue
                starved += len(batch) == 1
                if starved == SYSTEMATIC:
                    raise error
            if len(batch) == 1:
                failed[batch[0]] = error
                if len(failed) == len(indices) >= SYSTEMATIC:
                    raise error
            else:
                half = len(batch) // 2
                todo += [batch[half:], batch[:half]]
    return failed
