"""The second stage, a GPU actor: encodes pixels and keeps the visual tokens worth decoding.

The stage drops the array `pixels` and adds `tokens` and `kept` (`token_arrays.py`). It sets `num_visual_tokens` and
`crop_tokens` of each image and `sample` of each sampled image. The actor holds the vision tower and the projector, and
nothing of the language model. Tokens are selected and merged here, before they leave the stage: 56 instead of 576
tokens of an image go to the next stage. For a method that prunes inside the language model, all tokens do.

Pictures of free size go through the tower in the order of their numbers of tokens: pictures of equal numbers then share
a batch, and the method takes them together.
"""

import itertools
from typing import Any

import numpy as np

from otprune.families import Size
from otprune.models import Checkpoint, Kept
from pipelines.config.keys import PruneConfig
from pipelines.stages.batches import Suspicion, run_batches
from pipelines.stages.gpu import Place, exit_if_cuda_is_broken, limit_memory
from pipelines.stages.overview import count_crops
from pipelines.stages.prune import Pruner
from pipelines.stages.seeds import image_seed
from pipelines.stages.thumbnail import make_sample
from pipelines.stages.token_arrays import as_tensor, pack
from pipelines.stages.unit_batch import UnitBatch
from pipelines.stages.upload import CudaCopy, Uploader
from pipelines.text import clean

LARGE = 3072  # visual tokens from which a picture counts as several of a batch


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
        self.checkpoint = checkpoint
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
        geometry, whole = self.checkpoint.geometry, self.checkpoint.whole_geometry
        frames, rows = unit_batch.frames(geometry), unit_batch.rows()
        unit_batch.arrays = {}
        kept_by_row, failed = self._prune(unit_batch, frames)
        for index, error in failed.items():
            unit_batch.reject(index, "encode", f"{type(error).__name__}: {error}")
        kept_rows: list[Kept] = []  # one for each row of the new arrays
        for i, image in enumerate(unit_batch.images):
            if i not in failed:
                pictures = [kept_by_row[row] for row in rows[i]]
                firsts = [prompts[0] for prompts in pictures]
                if geometry == whole:
                    image.num_visual_tokens = sum(kept.num_visual for kept in firsts)
                else:  # the pictures were sent smaller
                    image.num_visual_tokens = sum(whole.num_visual(size) for size in image.sizes)
                if image.sampled:
                    kept = firsts[0].source.tolist()
                    image.sample = make_sample(frames[rows[i].start], image.sizes[0], kept, geometry)
                # From picture by picture to prompt by prompt, the order of `UnitBatch.arrays`.
                kept_rows += [picture for prompt in zip(*pictures, strict=True) for picture in prompt]
        unit_batch.drop(failed.keys())
        unit_batch.rows_per_prompt = self.pruner.per_prompt
        unit_batch.arrays = pack(kept_rows, self.pruner.encoder.row_width, self.pruner.encoder.dtype)
        if geometry.tiled and not self.pruner.method.keeps_all:
            self._count_crops(unit_batch, [kept.num_visual for kept in kept_rows])

    def _count_crops(self, unit_batch: UnitBatch, num_visual: list[int]) -> None:
        """Sets `crop_tokens` of each image; `num_visual` holds the tokens before pruning of each row of the arrays."""
        kept = unit_batch.arrays["kept"].rows()
        for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
            sizes = itertools.cycle(image.sizes)  # of each prompt's pictures
            pictures = [(next(sizes), num_visual[row], kept[row]) for row in rows]
            image.crop_tokens = count_crops(pictures, self.checkpoint.geometry)

    def _prune(
        self, unit_batch: UnitBatch, frames: list[np.ndarray]
    ) -> tuple[dict[int, list[Kept]], dict[int, Exception]]:
        """Prunes the pictures of a unit; `frames` holds the frame of each.

        Returns:
            The kept tokens of each picture (one `Kept`, or one for each prompt if the method looks at the prompt), and
            the errors of the images that failed, by index.

        Raises:
            one of the errors, if the images are not at fault (`Suspicion`, `run_batches`).
        """
        # For each picture, the index of its image and its number among the image's pictures.
        pictures = [(i, number) for i, image in enumerate(unit_batch.images) for number in range(image.num_pictures)]
        sizes = [unit_batch.images[i].sizes[number] for i, number in pictures]
        seeds = [image_seed(unit_batch.images[i].sha256, self.seed + number) for i, number in pictures]
        prompts = [unit_batch.images[i].prompts for i, _ in pictures]
        kept_by_row: dict[int, list[Kept]] = {}

        with Uploader([as_tensor(frame.reshape(-1)) for frame in frames], self.to_gpu) as upload:

            def run(indices: list[int]) -> None:
                batch = [flat.view(frames[i].shape) for i, flat in zip(indices, upload(indices), strict=True)]
                kept = self.pruner(
                    batch, [sizes[i] for i in indices], [seeds[i] for i in indices], [prompts[i] for i in indices]
                )
                kept_by_row.update(zip(indices, kept, strict=True))

            failed_rows = run_batches(self._batches(sizes), run, upload.ahead)
        self.suspicion.note(len(frames) - len(failed_rows), failed_rows.values())
        return kept_by_row, {pictures[row][0]: error for row, error in failed_rows.items()}

    def _batches(self, sizes: list[Size]) -> list[list[int]]:
        """The pictures of each forward pass, by index."""
        geometry = self.checkpoint.geometry
        counts = [geometry.num_visual(size) for size in sizes]
        order = range(len(sizes)) if geometry.fixed else sorted(range(len(sizes)), key=counts.__getitem__)
        batches: list[list[int]] = []
        room = 0.0
        for i in order:
            share = max(1.0, counts[i] / LARGE)
            if share > room:
                batches.append([])
                room = self.batch_size
            batches[-1].append(i)
            room -= share
        return batches
