"""Recipes of a grid's points whose method is fitted to data (FitPrune): to the grid's own images where `grid.settings`
has none.

recipes.json in the grid's output holds them: a resumed grid goes on with the same, and another model or sample has
others. No answer is looked at, only how the unpruned model reads its first images and questions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otprune.methods import METHODS, InModel
from otprune.methods.base import Fit
from otprune.models import Checkpoint
from pipelines.accuracy.calibrate import read_sample
from pipelines.accuracy.config import AccuracyConfig
from pipelines.accuracy.evaluate import make_question_reader
from pipelines.accuracy.find_questions import Asked, first_spans
from pipelines.accuracy.read_questions import ReadQuestions
from pipelines.errors import UserError
from pipelines.output.span import SpanRow
from pipelines.run.cluster import call_on_cluster
from pipelines.run.job import Job
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store

FILE = "recipes.json"
Recipes = dict[float, dict[int, int]]  # retention -> {layer: tokens that leave after it}


def unfitted(config: AccuracyConfig) -> tuple[str, Fit] | None:
    """The grid's method that cannot run without a fit to data and is not told what one found; and its fit."""
    for name in config.grid.methods:
        method = METHODS.get(name)
        fit = method.fit if isinstance(method, InModel) else None
        if fit is not None and not config.grid.settings.get(name, {}).get(fit.setting):
            return name, fit
    return None


def known_recipes(config: AccuracyConfig, output: Store, checkpoint: Checkpoint) -> Recipes:
    """Those that an earlier run of this grid fitted to the same model and number of images."""
    stored = json.loads(output.read(FILE)) if output.exists(FILE) else {}
    if any(stored.get(name) != value for name, value in _fitted_to(config, checkpoint).items()):
        return {}
    return {float(r): {int(layer): n for layer, n in recipe.items()} for r, recipe in stored["recipes"].items()}


def fit_recipes(
    config: AccuracyConfig, asked: Asked, job: Job, output: Store, fit: Fit, known: Recipes, retentions: Sequence[float]
) -> Recipes:
    """`known` with those that `fit` finds for `retentions`, kept in `output`; one task that holds an encode actor's
    share of a GPU.

    `job` is any point's: the images are read and the model is found as it says.

    Raises:
        UserError: if none of the first `grid.calibration_images` images can be read.
    """
    read, spans = make_question_reader(asked, job), first_spans(asked, config.grid.calibration_images)
    how = config.model.dtype, config.prompt.conversation, fit, list(retentions)
    fitted = call_on_cluster(config, job.checkpoint, _fit, read, spans, str(job.checkpoint.path), *how)
    if fitted is None:
        raise UserError(f"grid.calibration_images: none of the first {config.grid.calibration_images} can be read")
    recipes = {**known, **dict(zip(retentions, fitted, strict=True))}
    stored = {**_fitted_to(config, job.checkpoint), "recipes": {str(r): recipe for r, recipe in recipes.items()}}
    output.write(FILE, json.dumps(stored).encode())
    return recipes


def _fitted_to(config: AccuracyConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"model": checkpoint.digest, "images": config.grid.calibration_images, "budget": "as executed"}


def _fit(
    read: ReadQuestions, spans: list[SpanRow], model: str, dtype: str, style: str, fit: Fit, retentions: list[float]
) -> list[dict[int, int]] | None:
    """Every image with one of its questions, another one from image to image."""
    pictures = []
    for span in spans:
        for row in read(span.to_row()):
            unit_batch = UnitBatch.from_row(row)
            if unit_batch.error is not None:
                raise RuntimeError(unit_batch.error)
            for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
                if image.num_pictures == 1:
                    prompt = image.prompts[len(pictures) % len(image.prompts)]
                    pictures.append((unit_batch.arrays["pixels"][rows.start], prompt))
    sample = read_sample(Path(model), pictures, dtype=dtype, style=style)
    return fit.values(sample, retentions) if pictures else None
