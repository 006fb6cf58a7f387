"""Second stage, a GPU actor: pixels -> the visual tokens worth decoding.

Adds `tokens` and `kept` (`token_arrays.py`); drops `pixels`. Sets each image's `num_visual_tokens`, and the `sample` of
those sampled. Holds the vision tower and the projector, nothing of the language model. Selection and merging happen
here, before the stage border: 56 of 576 tokens cross it, not 576. Methods that prune inside the language model get all
tokens.
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
from pipelines.stages.seeds import image_seed
from pipelines.stages.thumbnail import thumbnail
from pipelines.stages.token_arrays import Kept, as_tensor, pack, to_numpy
from pipelines.stages.unit_batch import Sample, UnitBatch
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
        rows = unit_batch.rows()
        parts, guilty = self._prune(unit_batch, pixels, sizes)
        for index, error in guilty.items():
            unit_batch.reject(index, "encode", f"{type(error).__name__}: {error}")
        kept: list[Kept] = []  # rows of the arrays to come
        for i, image in enumerate(unit_batch.images):
            if i not in guilty:
                pictures = [parts[row] for row in rows[i]]
                image.num_visual_tokens = sum(self._num_visual(prompts[0]) for prompts in pictures)
                if image.sampled:
                    image.sample = self._sample(pixels[rows[i].start], pictures[0][0])
                kept += [picture for prompt in zip(*pictures, strict=True) for picture in prompt]
        unit_batch.drop(guilty.keys())
        unit_batch.rows_per_prompt = self.pruner.per_prompt
        unit_batch.arrays = self._arrays(kept)

    def _prune(
        self, unit_batch: UnitBatch, pixels: Tensor, sizes: np.ndarray | None
    ) -> tuple[dict[int, list[Kept]], dict[int, Exception]]:
        """What is kept of each row of `pixels` (of each prompt, where the method looks at it); images that failed.

        Raises:
            one of the errors, if they are not the images' fault (`Suspicion`, `run_batched`).
        """
        pictures = [
            (i, number) for i, image in enumerate(unit_batch.images) for number in range(image.num_pictures)
        ]  # the owner of each row, and which of its pictures the row is
        seeds = [image_seed(unit_batch.images[i].sha256, self.seed + number) for i, number in pictures]
        prompts = [unit_batch.images[i].prompts for i, _ in pictures]
        parts: dict[int, list[Kept]] = {}

        with Uploader(pixels, self.to_gpu) as upload:

            def run(indices: list[int]) -> None:
                chosen = torch.tensor([seeds[i] for i in indices])
                shapes = None if sizes is None else sizes[indices]
                kept = self.pruner(upload(indices), chosen, [prompts[i] for i in indices], shapes)
                parts.update(zip(indices, kept, strict=True))

            failed = run_batched(list(range(len(pixels))), self.batch_size, run, upload.ahead)
        self.suspicion.note(len(pixels) - len(failed), failed.values())
        return parts, {pictures[row][0]: error for row, error in failed.items()}

    def _num_visual(self, kept: Kept) -> int:
        """Visual tokens of one picture before pruning."""
        return self.encoder.num_tokens if kept.num_visual is None else kept.num_visual

    def _sample(self, pixels: Tensor, kept: Kept) -> Sample:
        """Of an image's first picture; of tiles, which have one dimension more, the overview, which comes first."""
        num_tokens = self.encoder.num_tokens
        shown = pixels if pixels.dim() == 3 else pixels[0]
        return Sample(thumbnail(shown), kept.source[kept.source < num_tokens].tolist(), num_tokens)

    def _arrays(self, rows: list[Kept]) -> dict[str, np.ndarray]:
        if rows:
            return pack(rows)
        tokens = torch.empty(0, self.pruner.k, self.encoder.width, dtype=self.encoder.dtype)
        return {"tokens": to_numpy(tokens), "kept": np.empty((0, self.pruner.k), np.int16)}
