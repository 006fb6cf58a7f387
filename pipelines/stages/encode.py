"""Second stage, a GPU actor: pixels -> the visual tokens worth decoding.

Adds `tokens` and `kept` (`tokens.py`); drops `pixels`. Holds the vision tower and the projector, nothing of the
language model. Selection and merging happen here, before the stage border: 56 of 576 tokens cross it, not 576. Methods
that prune inside the language model get every token.
"""

import base64
import io
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from pipelines.stages.prune import Pruner
from pipelines.stages.token_arrays import Kept, as_tensor, pack, to_numpy
from pipelines.stages.unit_batch import Work, clean
from pipelines.stages.upload import CudaCopy, Uploader

THUMBNAIL = 224  # pixels a side
SYSTEMATIC = 8  # when so many images all fail, it is not the images
OOM_WAITS = (0.5, 2.0)  # seconds before one image alone is tried again on a GPU that has no memory left
CONTEXT_BYTES = 0.6e9  # of a CUDA process, outside torch's account


class Encoder:
    """The actor. Arguments are plain values, so that it runs without Ray as well."""

    def __init__(
        self,
        *,
        model_path: str,
        dtype: str,
        device: str,
        method: str,
        retention: float,
        gamma: float | None,
        gamma_scale: str,
        settings: dict[str, Any],
        seed: int,
        batch_size: int,
        per_tile: bool = False,
        gpu_share: float = 1.0,
    ):
        limit_memory(device, gpu_share)
        self.pruner = Pruner(
            model=Path(model_path),
            dtype=torch_dtype(dtype, device),
            device=device,
            method=method,
            retention=retention,
            gamma=gamma,
            gamma_scale=gamma_scale,
            settings=settings,
            per_tile=per_tile,
        )
        self.encoder = self.pruner.encoder
        self.seed, self.batch_size = seed, batch_size
        # one for all units: torch keeps the memory of each stream apart
        self.to_gpu = None if device == "cpu" else CudaCopy(device)
        self.suspicion = Suspicion()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        work = Work.from_row(row)
        if work.error is None:
            try:
                with work.timed("encode"):
                    self._encode(work)
            except Exception as error:
                exit_if_cuda_is_broken(error)
                work.error = f"encode: {type(error).__name__}: {clean(str(error))}"
        if work.error is not None:
            work.arrays = {}
        return work.to_row()

    def _encode(self, work: Work) -> None:
        pixels, sizes = as_tensor(work.arrays.pop("pixels")), work.arrays.pop("sizes", None)
        owners = [i for i, rows in enumerate(work.rows()) for _ in rows]
        seeds = [
            image_seed(image.sha256, self.seed + picture)
            for image in work.images
            for picture in range(image.num_pictures)
        ]
        prompts = [image.prompts for image in work.images for _ in range(image.num_pictures)]
        parts: dict[int, list[Kept]] = {}

        with Uploader(pixels, self.to_gpu) as upload:

            def run(indices: list[int]) -> None:
                chosen = torch.tensor([seeds[i] for i in indices])
                shapes = None if sizes is None else sizes[indices]
                kept = self.pruner(upload(indices), chosen, [prompts[i] for i in indices], shapes)
                parts.update(zip(indices, kept, strict=True))

            failed = run_batched(list(range(len(pixels))), self.batch_size, run, upload.ahead)
        self.suspicion.note(len(pixels) - len(failed), failed.values())
        guilty = {owners[row]: error for row, error in failed.items()}
        for index, error in guilty.items():
            work.reject(index, "encode", f"{type(error).__name__}: {error}")
        work.num_visual_tokens = self.encoder.num_tokens
        for i, (image, rows) in enumerate(zip(work.images, work.rows(), strict=True)):
            image.num_visual_tokens = 0 if i in guilty else sum(parts[row][0].num_visual for row in rows)
        self._add_samples(work, pixels, parts)
        pictures = [[parts[row] for row in rows] for i, rows in enumerate(work.rows()) if i not in guilty]
        work.drop(guilty.keys())
        work.rows_per_prompt = self.pruner.per_prompt
        work.arrays = self._arrays([row for shown in pictures for prompt in zip(*shown, strict=True) for row in prompt])

    def _arrays(self, rows: list[Kept]) -> dict[str, np.ndarray]:
        if rows:
            return pack(rows)
        tokens = torch.empty(0, self.pruner.k, self.encoder.width, dtype=self.encoder.dtype)
        return {"tokens": to_numpy(tokens), "kept": np.empty((0, self.pruner.k), np.int16)}

    def _add_samples(self, work: Work, pixels: Tensor, parts: dict[int, list[Kept]]) -> None:
        for image, (i, *_) in zip(work.images, work.rows(), strict=True):
            if image.sample is not None and i in parts:
                shown = pixels[i] if pixels[i].dim() == 3 else pixels[i][0]  # the overview of tiles
                num_tokens, source = self.encoder.num_tokens, parts[i][0].source
                kept = source[source < num_tokens].tolist()
                image.sample = {"jpeg": thumbnail(shown), "kept": kept, "num_tokens": num_tokens}


def thumbnail(pixels: Tensor) -> str:
    """uint8 [H, H, 3] as a small JPEG in base64."""
    small = PILImage.fromarray(pixels.numpy()).resize((THUMBNAIL, THUMBNAIL))
    small.save(stream := io.BytesIO(), "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()


def image_seed(sha256: str, seed: int) -> int:
    """Seed of one image's random selection: it depends on the image's bytes, never on its batch."""
    return (int(sha256[:15], 16) + seed) % 2**62


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


def exit_if_cuda_is_broken(error: Exception) -> None:
    """Ends the process after an error that poisons the CUDA context, so that Ray starts a fresh actor.

    `os._exit`, since an orderly exit would tell Ray that the actor is meant to stay dead.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" not in text:
        return
    print(f"the CUDA context is broken, the actor restarts: {clean(text)}", flush=True)
    os._exit(1)


def limit_memory(device: str, share: float) -> None:
    """Keeps torch within this process's share of a GPU that it shares, its CUDA context included."""
    if device == "cpu" or not 0 < share < 1:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.05, share - CONTEXT_BYTES / total), device)


def torch_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
