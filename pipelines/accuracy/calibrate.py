"""Calibration: finds the settings that a method inside the language model takes from data.

FitPrune needs a recipe (tokens to delete after each layer), VTW the layer at which it withdraws the image. Both
methods watch the unpruned model read a sample of the user's own images under the user's own prompt. The result is
JSON: {"method", "model", "samples", "recipe"} for FitPrune, {..., "layer", "divergences"} for VTW.

FitPrune's alpha follows from `prune.retention`, not from a percentage of its own: alpha is the largest value whose
prefill costs no less than a selector's, as `run/pruning.py` counts the cost.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from otprune.methods import METHODS, InModel, Sample
from otprune.models import Checkpoint, load_decoder, load_encoder
from otprune.models.llava import image_span
from pipelines.accuracy.config import CalibrateConfig
from pipelines.errors import UserError
from pipelines.output.plan import make_plan
from pipelines.run.job import Job, check_model, find_input
from pipelines.run.stages import make_reader
from pipelines.stages.gpu import torch_dtype
from pipelines.stages.token_arrays import as_tensor
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store

logger = logging.getLogger(__name__)

BATCH = 8  # images in one pass through the vision tower


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """The content of the JSON file at `calibrate.path`.

    Raises:
        UserError: if the method takes no setting from data, if there is no model, or if no image can be read.
    """
    method = METHODS.get(config.prune.method)
    if not isinstance(method, InModel) or method.calibrate is None:
        calibrating = sorted(name for name, other in METHODS.items() if isinstance(other, InModel) and other.calibrate)
        raise UserError(
            f"prune.method must be {' or '.join(calibrating)}, the methods that calibrate, got {config.prune.method}"
        )
    checkpoint = check_model(config, writes=False)
    pictures = _pictures(config, checkpoint)
    sample = read_sample(checkpoint.path, pictures, dtype=config.model.dtype, style=config.prompt.conversation)
    if not sample.embeds:
        raise UserError(f"input.path must begin with images that can be read, found none in {config.input.path}")
    settings = method.calibrate(
        sample,
        retention=config.prune.retention,
        threshold=config.calibrate.threshold,
        first_layer=config.calibrate.first_layer,
    )
    return {"method": method.name, "model": checkpoint.digest, "samples": len(sample.embeds), **settings}


def read_sample(model: Path, pictures: Iterable[tuple[np.ndarray, str]], *, dtype: str, style: str) -> Sample:
    """The prompts of `pictures` as the language model reads them: input embeddings and the span of the image in each.

    A picture is a decoded image with one prompt. The vision tower runs on a GPU if this process sees one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(model, dtype=torch_dtype(dtype, device), device=device)
    decoder = load_decoder(model, dtype=torch_dtype(dtype, device), device=device)
    embeds, spans = [], []
    pictures = list(pictures)
    for start in range(0, len(pictures), BATCH):
        pixels, texts = zip(*pictures[start : start + BATCH], strict=True)
        for tokens, text in zip(encoder(as_tensor(np.stack(pixels))), texts, strict=True):
            prompt = decoder.encode_prompt(text, style)
            embeds.append(decoder.embed(tokens, prompt))
            spans.append(image_span(prompt, len(embeds[-1])))
    logger.info("calibrating on %d images", len(embeds))
    return Sample(decoder.model, embeds, spans)


def _pictures(config: CalibrateConfig, checkpoint: Checkpoint) -> Iterator[tuple[np.ndarray, str]]:
    """Decoded pictures with their first prompts, in the order of the corpus."""
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
            for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
                yield unit_batch.arrays["pixels"][rows.start], image.prompts[0]
