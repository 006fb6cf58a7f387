"""Calibration: finds the settings that a method inside the language model takes from data.

FitPrune needs a recipe (tokens to delete after each layer), VTW the layer at which it withdraws the image. Both
methods watch the model read a sample of the user's own images under the user's own prompt, unpruned and pruned. The
result is JSON: {"method", "model", "samples", "recipe"} for FitPrune, {..., "layer", "divergences"} for VTW.

A method with a budget for each picture needs the threshold at which the pictures of a sample keep `prune.retention` of
their tokens together: {..., "threshold", "kept"} for logdet_adaptive. The vision tower alone runs.

FitPrune's budget follows from `prune.retention`, not from a percentage of its own: the recipe is that of the largest
percentage whose prefill costs no less than a selector's, as `run/pruning.py` counts the cost.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch

from otprune.families import Size
from otprune.methods import METHODS, InModel, Reducer, Sample
from otprune.models import Checkpoint, Kept, load_decoder, load_encoder
from otprune.models.decoder import image_span
from pipelines.accuracy.config import CalibrateConfig
from pipelines.config.keys import PromptConfig
from pipelines.errors import UserError
from pipelines.output.plan import make_plan
from pipelines.run.job import Job, check_model, find_input
from pipelines.run.stages import make_reader
from pipelines.stages.gpu import torch_dtype
from pipelines.stages.token_arrays import as_tensor
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")
BATCH = 8  # images in one pass through the vision tower


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """The content of the JSON file at `calibrate.path`.

    Raises:
        UserError: if the method takes no setting from data or cannot run in the model, if there is no model, if no
            image can be read, or if no setting meets the threshold or the budget.
    """
    method = METHODS.get(config.prune.method)
    if not isinstance(method, InModel | Reducer) or method.calibrate is None:
        calibrating = sorted(name for name, other in METHODS.items() if getattr(other, "calibrate", None))
        raise UserError(
            f"prune.method must be {' or '.join(calibrating)}, the methods that calibrate, got {config.prune.method}"
        )
    config, checkpoint = check_model(config, writes=False)
    if reason := checkpoint.record.refuses(method, checkpoint):
        raise UserError(f"prune.{reason}")
    pictures = _pictures(config, checkpoint)
    if isinstance(method, Reducer):
        return _calibrate_budget(config, method, checkpoint, pictures)
    sample = read_sample(checkpoint, pictures, dtype=config.model.dtype, prompt=config.prompt)
    if not sample.embeds:
        raise UserError(f"input.path must begin with images that can be read, found none in {config.input.path}")
    try:
        settings = method.calibrate(
            sample,
            retention=config.prune.share,
            threshold=config.calibrate.threshold,
            first_layer=config.calibrate.first_layer,
        )
    except ValueError as error:
        raise UserError(f"calibrate.{error}") from error
    return {"method": method.name, "model": checkpoint.digest, "samples": len(sample.embeds), **settings}


def _calibrate_budget(
    config: CalibrateConfig,
    method: Reducer,
    checkpoint: Checkpoint,
    pictures: Iterable[tuple[np.ndarray, Size, str]],
) -> dict[str, Any]:
    """As `calibrate`, of a method that reads a picture's tokens alone."""
    assert method.calibrate is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(checkpoint, dtype=torch_dtype(config.model.dtype, device), device=device)
    way, regions = "tiles" if config.prune.per_tile else "joint", []
    for batch in _batched(pictures, BATCH):
        frames, sizes, _ = zip(*batch, strict=True)
        seen = encoder.regions([as_tensor(frame) for frame in frames], sizes, way)
        regions += [[region.features for region in of_picture] for of_picture in seen]
    if not regions:
        raise UserError(f"input.path must begin with images that can be read, found none in {config.input.path}")
    given = {name: value for name, value in method.check(config.prune.settings).items() if name != "threshold"}
    features = [tokens for of_picture in regions for tokens in of_picture]
    found = method.calibrate(features, retention=config.prune.share_of_sent, **given)
    return {"method": method.name, "model": checkpoint.digest, "samples": len(regions), **found}


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items, in order."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_sample(
    checkpoint: Checkpoint, pictures: Iterable[tuple[np.ndarray, Size, str]], *, dtype: str, prompt: PromptConfig
) -> Sample:
    """The prompts of `pictures` as the language model reads them: input embeddings and the span of the image in each.

    A picture is the frame of a decoded image, its size, and one prompt. The vision tower runs on a GPU if this process
    sees one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(checkpoint, dtype=torch_dtype(dtype, device), device=device)
    decoder = load_decoder(checkpoint, dtype=torch_dtype(dtype, device), device=device)
    embeds, spans = [], []
    pictures = list(pictures)
    for start in range(0, len(pictures), BATCH):
        frames, sizes, texts = zip(*pictures[start : start + BATCH], strict=True)
        seen = encoder.regions([as_tensor(frame) for frame in frames], sizes, "grid")
        for regions, size, text in zip(seen, sizes, texts, strict=True):
            every = [Kept(r.features, torch.arange(len(r.features)), len(r.features)) for r in regions]
            kept = encoder.join(size, every, "grid")
            span = checkpoint.geometry.span(size, kept.source.numpy(), checkpoint.image_token)
            ids = decoder.encode_prompt(text, prompt.conversation, system=prompt.system)
            embeds.append(decoder.place([(kept.tokens, span)], ids).rows)
            spans.append(image_span(ids, len(embeds[-1])))
    logger.info("calibrating on %d images", len(embeds))
    return Sample(decoder.model, embeds, spans)


def _pictures(config: CalibrateConfig, checkpoint: Checkpoint) -> Iterator[tuple[np.ndarray, Size, str]]:
    """Decoded pictures with their sizes and first prompts, in the order of the corpus."""
    corpus = find_input(config)
    # An empty output makes the plan hold every image, whatever an earlier run committed to output.path.
    with TemporaryDirectory() as empty_folder:
        output = Store(empty_folder)
        plan = make_plan(
            corpus, output, "", num_images=config.unit.images, limit=config.calibrate.samples, num_samples=0
        )
    reader = make_reader(Job(config, checkpoint, corpus, output, {}, plan))
    for span in plan.spans:
        for row in reader(span.to_row()):
            unit_batch = UnitBatch.from_row(row)
            if unit_batch.error is not None:
                raise UserError(f"input.path must be readable: {unit_batch.error}")
            frames = unit_batch.frames(checkpoint.geometry)
            for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
                yield frames[rows.start], image.sizes[0], image.prompts[0]
