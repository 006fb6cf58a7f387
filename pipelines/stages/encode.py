"""The second stage, a GPU actor: encodes pixels and keeps the visual tokens worth decoding.

The stage drops the array `pixels` and adds `tokens` and `kept` (`token_arrays.py`). It sets `num_visual_tokens` of each
image and `sample` of each sampled image. The actor holds the vision tower and the projector, and nothing of the
language model. Tokens are selected and merged here, before they leave the stage: 56 instead of 576 tokens of an image
go to the next stage. For a method that prunes inside the language model, all tokens do.
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
    """The actor. All its arguments can be pickled; it also runs without Ray."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        prune: PruneConfig,
        settings: dict[str, Any],
        batch_size: int,
        place: Place,
    ):
        """`settings` are the method's, resolved for the checkpoint. `batch_size` is the images of one forward pass."""
        limit_memory(place.device, place.gpu_share)
        self.pruner = Pruner(checkpoint, prune, settings, place)
        self.encoder = self.pruner.encoder
        self.seed, self.batch_size = prune.seed, batch_size
        # One copier, and so one CUDA stream, for all units: torch caches memory for each stream apart.
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
        kept_by_row, failed = self._prune(unit_batch, pixels, sizes)
        for index, error in failed.items():
            unit_batch.reject(index, "encode", f"{type(error).__name__}: {error}")
        kept_rows: list[Kept] = []  # one for each row of the new arrays
        for i, image in enumerate(unit_batch.images):
            if i not in failed:
                pictures = [kept_by_row[row] for row in rows[i]]
                image.num_visual_tokens = sum(self._num_visual(prompts[0]) for prompts in pictures)
                if image.sampled:
                    image.sample = self._sample(pixels[rows[i].start], pictures[0][0])
                # From picture by picture to prompt by prompt, the order of `UnitBatch.arrays`.
                kept_rows += [picture for prompt in zip(*pictures, strict=True) for picture in prompt]
        unit_batch.drop(failed.keys())
        unit_batch.rows_per_prompt = self.pruner.per_prompt
        unit_batch.arrays = self._arrays(kept_rows)

    def _prune(
        self, unit_batch: UnitBatch, pixels: Tensor, sizes: np.ndarray | None
    ) -> tuple[dict[int, list[Kept]], dict[int, Exception]]:
        """Prunes the pictures of a unit.

        Returns:
            The kept tokens of each row of `pixels` (one `Kept`, or one for each prompt if the method looks at the
            prompt), and the errors of the images that failed, by index.

        Raises:
            one of the errors, if the images are not at fault (`Suspicion`, `run_batched`).
        """
        # For each row of `pixels`, the index of its image and the number of the picture among the image's pictures.
        pictures = [(i, number) for i, image in enumerate(unit_batch.images) for number in range(image.num_pictures)]
        seeds = [image_seed(unit_batch.images[i].sha256, self.seed + number) for i, number in pictures]
        prompts = [unit_batch.images[i].prompts for i, _ in pictures]
        kept_by_row: dict[int, list[Kept]] = {}

        with Uploader(pixels, self.to_gpu) as upload:

            def run(indices: list[int]) -> None:
                batch_seeds = torch.tensor([seeds[i] for i in indices])
                batch_sizes = None if sizes is None else sizes[indices]
                kept = self.pruner(upload(indices), batch_seeds, [prompts[i] for i in indices], batch_sizes)
                kept_by_row.update(zip(indices, kept, strict=True))

            failed_rows = run_batched(list(range(len(pixels))), self.batch_size, run, upload.ahead)
        self.suspicion.note(len(pixels) - len(failed_rows), failed_rows.values())
        return kept_by_row, {pictures[row][0]: error for row, error in failed_rows.items()}

    def _num_visual(self, kept: Kept) -> int:
        """Number of visual tokens of a picture before pruning."""
        return self.encoder.num_tokens if kept.num_visual is None else kept.num_visual

    def _sample(self, pixels: Tensor, kept: Kept) -> Sample:
        """The sample of an image, from the pixels [H, H, 3] or crops [T, H, H, 3] of its first picture.

        Of crops, the sample shows the overview, which comes first, and its kept tokens.
        """
        num_tokens = self.encoder.num_tokens
        overview = pixels if pixels.dim() == 3 else pixels[0]
        return Sample(thumbnail(overview), kept.source[kept.source < num_tokens].tolist(), num_tokens)

    def _arrays(self, rows: list[Kept]) -> dict[str, np.ndarray]:
        """The arrays `tokens` and `kept`. Without rows they are empty, but their columns have the same types."""
        if rows:
            return pack(rows)
        tokens = torch.empty(0, self.pruner.k, self.encoder.width, dtype=self.encoder.dtype)
        return {"tokens": to_numpy(tokens), "kept": np.empty((0, self.pruner.k), np.int16)}
