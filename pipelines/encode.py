"""Second stage, a GPU actor: pixels -> the visual tokens worth decoding.

Adds `tokens` [n, k, D] and `kept` int16 [n, k]; drops `pixels`. Holds the vision tower and the projector, nothing of
the language model. Selection happens here, before the stage border: 56 of 576 tokens cross it, not 576.
"""

import base64
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from otprune import num_kept, select_tokens
from otprune.models import load_encoder
from pipelines.work import Work, clean

THUMBNAIL = 224  # pixels a side
SYSTEMATIC = 8  # when so many images all fail, it is not the images


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
        seed: int,
        batch_size: int,
    ):
        self.encoder = load_encoder(Path(model_path), dtype=torch_dtype(dtype, device), device=device)
        self.method, self.seed, self.batch_size = method, seed, batch_size
        self.selection = {"method": method, "gamma": gamma, "gamma_scale": gamma_scale}
        num_tokens = self.encoder.num_tokens
        self.k = num_tokens if method == "none" else num_kept(retention, num_tokens)

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
        pixels = as_tensor(work.arrays.pop("pixels"))
        owners = [i for i, rows in enumerate(work.rows()) for _ in rows]
        seeds = [
            image_seed(image.sha256, self.seed + picture)
            for image in work.images
            for picture in range(image.num_pictures)
        ]
        parts: dict[int, tuple[Tensor, Tensor]] = {}

        def run(indices: list[int]) -> None:
            tokens, keep = self.select(self.encoder(pixels[indices]), torch.tensor([seeds[i] for i in indices]))
            parts.update({i: (tokens[j], keep[j]) for j, i in enumerate(indices)})

        failed = run_batched(list(range(len(pixels))), self.batch_size, run)
        guilty = {owners[row]: error for row, error in failed.items()}
        for index, error in guilty.items():
            work.reject(index, "encode", f"{type(error).__name__}: {error}")
        work.num_visual_tokens = self.encoder.num_tokens
        empty = (
            torch.empty(self.k, self.encoder.width, dtype=self.encoder.dtype),
            torch.empty(self.k, dtype=torch.int64),
        )
        rows = [parts.get(i, empty) for i in range(len(pixels))]
        shape = (0, self.k, self.encoder.width)
        tokens = torch.stack([row[0].cpu() for row in rows]) if rows else torch.empty(shape, dtype=self.encoder.dtype)
        kept = torch.stack([row[1].cpu() for row in rows]) if rows else torch.empty((0, self.k), dtype=torch.int64)
        self._add_samples(work, pixels, kept)
        work.arrays = {"tokens": to_numpy(tokens), "kept": kept.to(torch.int16).numpy()}
        work.drop(set(guilty))

    def select(self, features: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> kept tokens [B, k, D] and their ascending indices [B, k]."""
        B, N, D = features.shape
        if self.method == "none":
            return features, torch.arange(N).expand(B, N)
        keep = select_tokens(features, self.k, seed=seeds.to(features.device), **self.selection)
        return features.gather(1, keep[..., None].expand(-1, -1, D)), keep

    def _add_samples(self, work: Work, pixels: Tensor, kept: Tensor) -> None:
        for image, (i, *_) in zip(work.images, work.rows(), strict=True):
            if image.sample is not None:
                thumbnail = PILImage.fromarray(pixels[i].numpy()).resize((THUMBNAIL, THUMBNAIL))
                thumbnail.save(stream := io.BytesIO(), "JPEG", quality=80)
                jpeg = base64.b64encode(stream.getvalue()).decode()
                image.sample = {"jpeg": jpeg, "kept": kept[i].tolist(), "num_tokens": self.encoder.num_tokens}


def image_seed(sha256: str, seed: int) -> int:
    """Seed of one image's random selection: it depends on the image's bytes, never on its batch."""
    return (int(sha256[:15], 16) + seed) % 2**62


def run_batched(indices: list[int], batch_size: int, run: Callable[[list[int]], None]) -> dict[int, Exception]:
    """Runs `run` on batches; halves a batch that fails, down to the guilty images, and returns their errors.

    Raises:
        the last error, if SYSTEMATIC images or more were tried and every one failed: then they are not to blame.
    """
    failed: dict[int, Exception] = {}
    todo = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    while todo:
        batch = todo.pop()
        try:
            run(batch)
        except Exception as error:
            exit_if_cuda_is_broken(error)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(batch) == 1:
                failed[batch[0]] = error
                if len(failed) == len(indices) >= SYSTEMATIC:
                    raise
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


def torch_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def as_tensor(array: np.ndarray) -> Tensor:
    """The array without a copy. Those of the object store are read-only, which is fine: no stage writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tokens: Tensor) -> np.ndarray:
    """bfloat16, which NumPy lacks, goes as its bits in int16; `from_numpy` turns it back."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def from_numpy(tokens: np.ndarray) -> Tensor:
    tensor = as_tensor(tokens)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
