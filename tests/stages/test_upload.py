"""Batches arrive whole and in time, copied ahead or not, whichever batch is asked for."""

import threading

import pytest
import torch

from pipelines.stages.batches import run_batched
from pipelines.stages.upload import CudaCopy, Uploader

PIXELS = list(torch.arange(55, dtype=torch.uint8).split([*range(1, 11)]))
"""Ten pictures of 1 to 10 values."""


def same(batch, indices) -> bool:
    """Whether a batch holds these pictures, each with its own length."""
    return all(torch.equal(got, PIXELS[i]) for got, i in zip(batch, indices, strict=True))


class Copies:
    """Copies as a GPU would be given them, and notes what was asked for and on which thread."""

    def __init__(self, fails: int | None = None):
        self.fails, self.asked, self.threads = fails, [], []

    def __call__(self, rows):
        indices = [len(row) - 1 for row in rows]
        self.asked.append(indices)
        self.threads.append(threading.current_thread())
        if self.fails in indices:
            raise torch.OutOfMemoryError("CUDA out of memory")
        copied = torch.cat(list(rows))
        return lambda: copied


def test_every_batch_but_the_first_is_copied_ahead_on_another_thread():
    copies, seen = Copies(), []
    with Uploader(PIXELS, copies) as upload:
        assert run_batched(list(range(10)), 4, lambda i: seen.append((i, upload(i))), upload.ahead) == {}
    assert sorted(i for indices, _ in seen for i in indices) == list(range(10))
    assert all(same(batch, indices) for indices, batch in seen)
    assert sorted(map(tuple, copies.asked)) == sorted(tuple(indices) for indices, _ in seen)  # each once
    assert sum(thread is threading.main_thread() for thread in copies.threads) == 1


def test_a_batch_that_fails_and_is_halved_still_meets_its_own_pictures():
    seen = {}

    def run(indices):
        batch = upload(indices)
        if len(indices) > 1 and 5 in indices:
            raise ValueError("a guilty picture")
        seen.update(zip(indices, batch, strict=True))

    with Uploader(PIXELS, Copies()) as upload:
        assert run_batched(list(range(10)), 4, run, upload.ahead) == {}
    assert len(seen) == 10
    assert same(seen.values(), seen)


def test_what_copying_ran_into_is_the_error_of_its_own_batch():
    with Uploader(PIXELS, Copies(fails=2)) as upload:
        failed = run_batched(list(range(10)), 4, lambda i: upload(i), upload.ahead)
    assert list(failed) == [2]


def test_on_a_cpu_nothing_is_copied_ahead():
    with Uploader(PIXELS, None) as upload:
        upload.ahead([0, 1])
        batch = upload([3, 1])
    assert same(batch, [3, 1])
    assert all(got is PIXELS[i] for got, i in zip(batch, [3, 1], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pictures_of_different_sizes_reach_a_gpu_unchanged():
    sides = [28 * (1 + i % 12) for i in range(64)]
    pixels = [torch.randint(0, 256, (3 * side * side,), dtype=torch.uint8) for side in sides]
    arrived = {}
    with Uploader(pixels, CudaCopy("cuda")) as upload:
        run_batched(list(range(64)), 16, lambda i: arrived.update(zip(i, upload(i), strict=True)), upload.ahead)
    assert sorted(arrived) == list(range(64))
    assert all(picture.is_cuda and torch.equal(picture.cpu(), pixels[i]) for i, picture in arrived.items())
