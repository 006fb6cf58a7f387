"""Second stage, a GPU actor: pixels -> the visual tokens worth decoding.

Adds `tokens` and `kept` (`tokens.py`); drops `pixels`. Holds the vision tower and the projector, nothing of the
language model. Selection and merging happen here, before the stage border: 56 of 576 tokens cross it, not 576. Methods
that prune inside the language model get every token.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from otprune.models import Checkpoint
from pipelines.config.keys import PruneConfig
from pipelines.stages.batches import Suspicion, run_batched
from pipelines.stages.gpu import Place, exit_if_cuda_is_broken, limit_memory
from pipelines.stages.prune import Pruner
from pipelines.stages.thumbnail import thumbnail
from pipelines.stages.token_arrays import Kept, as_tensor, pack, to_numpy
from pipelines.stages.unit_batch import UnitBatch
from pipelines.stages.upload import CudaCopy, Uploader
from pipelines.text import clean


class Encoder:
    """The actor. Its arguments are values that pickle, so that it runs without Ray as well."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        prune: PruneConfig,
        settings: dict[str, Any],
        batch_size: int,
        place: Place,
    ):
        """`settings` are the method's, resolved for the checkpoint; `batch_size` counts images of a forward pass."""
        limit_memory(place.device, place.gpu_share)
        self.pruner = Pruner(checkpoint, prune, settings, place)
        self.encoder = self.pruner.encoder
        self.seed, self.batch_size = prune.seed, batch_size
        # one for all units: torch keeps the memory of each stream apart
        self.to_gpu = None if place.device == "cpu" else CudaCopy(place.device)
        self.suspicion = Suspicion()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch = UnitBatch.from_row(row)
        if unit_batch.error is None:
            try:
                with unit_batch.timed("encode"):
                    self._encode(unit_batch)
            except Exception as error:
                exit_if_cuda_is_broken(error)
                unit_batch.error = f"encode: {type(error).__name__}: {clean(str(error))}"
        if unit_batch.error is not None:
            unit_batch.arrays = {}
        return unit_batch.to_row()

    def _encode(self, unit_batch: UnitBatch) -> None:
        pixels, sizes = as_tensor(unit_batch.arrays.pop("pixels")), unit_batch.arrays.pop("sizes", None)
        owners = [i for i, rows in enumerate(unit_batch.rows()) for _ in rows]
        seeds = [
            image_seed(image.sha256, self.seed + picture)
            for image in unit_batch.images
            for picture in range(image.num_pictures)
        ]
        prompts = [image.prompts for image in unit_batch.images for _ in range(image.num_pictures)]
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
            unit_batch.reject(index, "encode", f"{type(error).__name__}: {error}")
        unit_batch.num_visual_tokens = self.encoder.num_tokens
        for i, (image, rows) in enumerate(zip(unit_batch.images, unit_batch.rows(), strict=True)):
            image.num_visual_tokens = 0 if i in guilty else sum(parts[row][0].num_visual for row in rows)
        self._add_samples(unit_batch, pixels, parts)
        pictures = [[parts[row] for row in rows] for i, rows in enumerate(unit_batch.rows()) if i not in guilty]
        unit_batch.drop(guilty.keys())
        unit_batch.rows_per_prompt = self.pruner.per_prompt
        unit_batch.arrays = self._arrays(
            [row for shown in pictures for prompt in zip(*shown, strict=True) for row in prompt]
        )

    def _arrays(self, rows: list[Kept]) -> dict[str, np.ndarray]:
        if rows:
            return pack(rows)
        tokens = torch.empty(0, self.pruner.k, self.encoder.width, dtype=self.encoder.dtype)
        return {"tokens": to_numpy(tokens), "kept": np.empty((0, self.pruner.k), np.int16)}

    def _add_samples(self, unit_batch: UnitBatch, pixels: Tensor, parts: dict[int, list[Kept]]) -> None:
        for image, (i, *_) in zip(unit_batch.images, unit_batch.rows(), strict=True):
            if image.sample is not None and i in parts:
                shown = pixels[i] if pixels[i].dim() == 3 else pixels[i][0]  # the overview of tiles
                num_tokens, source = self.encoder.num_tokens, parts[i][0].source
                kept = source[source < num_tokens].tolist()
                image.sample = {"jpeg": thumbnail(shown), "kept": kept, "num_tokens": num_tokens}


def image_seed(sha256: str, seed: int) -> int:
    """Seed of one image's random selection: it depends on the image's bytes, never on its batch."""
    return (int(sha256[:15], 16) + seed) % 2**62
