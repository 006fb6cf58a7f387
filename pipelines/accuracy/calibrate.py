"""Settings that methods inside the language model take from data: FitPrune's recipe and VTW's layer.

Both look at how the unpruned model reads a sample of the user's own images under the user's own prompt, and write what
they found as JSON: {"method", "model", "samples", "recipe"} or {..., "layer", "divergences"}.

FitPrune's alpha follows from no percentage of its own but from `prune.retention`: it is the largest whose prefill costs
no less than a selector's, as `equal_flops.py` counts it.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otprune.budget import selector_prefill
from otprune.flops import match_flops, prefill_flops
from otprune.layerwise import vtw_divergences
from otprune.layerwise.fitprune_fit import TOLERANCE, measure, recipe_at
from otprune.models import Checkpoint, load_decoder, load_encoder
from otprune.models.llava import image_span
from otprune.schedules import visual_rows
from otprune.shapes import LanguageShape
from pipelines.config.keys import CalibrateConfig
from pipelines.errors import UserError
from pipelines.output.plan import make_plan
from pipelines.run.job import Job, check_model, find_input
from pipelines.run.stages import make_reader
from pipelines.stages.gpu import torch_dtype
from pipelines.stages.token_arrays import as_tensor
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store

logger = logging.getLogger(__name__)

BATCH = 8  # images of one pass through the vision tower
RELEASED_FIRST_LAYER, RELEASED_LAYERS = 5, 32  # where VTW's search begins, and of how many layers at least


@dataclass(frozen=True, slots=True)
class Sample:
    """The unpruned model and prompts for it: input rows [length, D] and the span of each prompt's image."""

    model: Any
    embeds: list[Tensor]
    spans: list[tuple[int, int]]


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """What `calibrate.path` is to hold.

    Raises:
        UserError: if the method takes nothing from data, or there is no model or no readable image.
    """
    method = config.prune.method
    if method not in ("fitprune", "vtw"):
        raise UserError(f"prune.method must be fitprune or vtw, the methods that calibrate, got {method}")
    checkpoint = check_model(config, writes=False)
    pictures = _pictures(config, checkpoint)
    sample = read_sample(checkpoint.path, pictures, dtype=config.model.dtype, style=config.prompt.conversation)
    if not sample.embeds:
        raise UserError(f"input.path must begin with images that can be read, found none in {config.input.path}")
    found = {"method": method, "model": checkpoint.digest, "samples": len(sample.embeds)}
    if method == "fitprune":
        [recipe] = fit_to_retentions(sample, [config.prune.retention])
        return found | {"recipe": recipe}
    num_layers, first = len(sample.model.model.layers), config.calibrate.first_layer
    first = first_layer(num_layers) if first is None else first
    divergences = dict(vtw_divergences(sample.model, sample.embeds, sample.spans, first_layer=first))
    below = (layer for layer, value in divergences.items() if value <= config.calibrate.threshold)
    return found | {"layer": next(below, num_layers), "divergences": divergences}


def first_layer(num_layers: int) -> int:
    """Where VTW's search begins: the release's layer, and in a model of fewer layers than its own in proportion."""
    return min(RELEASED_FIRST_LAYER, round(num_layers * RELEASED_FIRST_LAYER / RELEASED_LAYERS))


def read_sample(model: Path, pictures: Iterable[tuple[np.ndarray, str]], *, dtype: str, style: str) -> Sample:
    """The model's own view of `pictures`, decoded images with a prompt each; on a GPU if this process sees one."""
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


def fit_to_retentions(sample: Sample, retentions: Sequence[float]) -> list[dict[int, int]]:
    """FitPrune's recipe for each: of the largest alpha whose prefill costs no less than a selector's."""
    shape = LanguageShape.from_config(sample.model.config)
    num_visual, text = _sizes(sample)
    masses = measure(sample.model, sample.embeds, sample.spans)
    alphas = np.arange(0, 1 + TOLERANCE / 2, TOLERANCE).tolist()

    def flops(**settings: Any) -> int:
        return prefill_flops(shape, text, visual=visual_rows("fitprune", num_visual, shape.layers, **settings))

    sizes: dict[str, Any] = {"num_visual": num_visual, "num_layers": shape.layers}
    recipes = [recipe_at(*masses, alpha) for alpha in alphas]
    fitted = []
    for retention in retentions:
        target = selector_prefill(shape, text, num_visual, retention)
        fitted.append(match_flops("fitprune", flops, target, **sizes, recipes=recipes)["recipe"])
    return fitted


def _sizes(sample: Sample) -> tuple[int, int]:
    """Visual tokens and text tokens of the first prompt."""
    (start, end), length = sample.spans[0], len(sample.embeds[0])
    return end - start, length - (end - start)


def _pictures(config: CalibrateConfig, checkpoint: Checkpoint) -> Iterator[tuple[np.ndarray, str]]:
    """Decoded pictures with their first prompts, in the corpus's order."""
    corpus = find_input(config)
    with TemporaryDirectory() as nothing_done:
        output = Store(nothing_done)
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
