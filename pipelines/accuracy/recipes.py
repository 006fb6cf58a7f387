"""Fits the recipes of a method that takes its setting from data (FitPrune), if `grid.settings` holds none.

The fit lets the model read the grid's own first images and questions, and sees no answer. recipes.json in
the grid's output stores the recipes, so that a resumed grid uses the same ones. A grid with another model or sample
fits its own.
"""

import json
from collections.abc import Sequence
from typing import Any

from otprune.methods import METHODS, InModel
from otprune.methods.base import Fit
from otprune.models import Checkpoint
from pipelines.accuracy.calibrate import read_sample
from pipelines.accuracy.config import AccuracyConfig
from pipelines.accuracy.evaluate import make_question_reader
from pipelines.accuracy.find_questions import Questions, first_spans
from pipelines.accuracy.read_questions import ReadQuestions
from pipelines.config.keys import PromptConfig
from pipelines.errors import UserError
from pipelines.output.span import SpanRow
from pipelines.run.cluster import call_on_cluster
from pipelines.run.job import Job
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store

FILE = "recipes.json"
Recipes = dict[float, dict[int, int]]  # retention -> {layer: tokens to delete after it}


def unfitted(config: AccuracyConfig) -> tuple[str, Fit] | None:
    """The grid's method that needs a fit to data and has no such setting in `grid.settings`, with its fit; or None."""
    for name in config.grid.methods:
        method = METHODS.get(name)
        fit = method.fit if isinstance(method, InModel) else None
        if fit is not None and not config.grid.settings.get(name, {}).get(fit.setting):
            return name, fit
    return None


def known_recipes(config: AccuracyConfig, output: Store, checkpoint: Checkpoint) -> Recipes:
    """The recipes that an earlier run of this grid fitted to the same model and number of images; else none."""
    stored = json.loads(output.read(FILE)) if output.exists(FILE) else {}
    if any(stored.get(name) != value for name, value in _basis(config, checkpoint).items()):
        return {}
    # JSON keys are strings: retentions and layers become numbers again.
    return {float(r): {int(layer): n for layer, n in recipe.items()} for r, recipe in stored["recipes"].items()}


def fit_recipes(
    config: AccuracyConfig,
    questions: Questions,
    job: Job,
    output: Store,
    fit: Fit,
    known: Recipes,
    retentions: Sequence[float],
) -> Recipes:
    """Fits a recipe for each of `retentions`, adds them to `known`, and stores all of them in `output`.

    One Ray task, which holds an encode actor's share of a GPU, runs the fit. `job` may be the job of any point: it says
    how to decode images and where the model is.

    Raises:
        UserError: if none of the first `grid.calibration_images` images can be read.
    """
    read, spans = make_question_reader(questions, job), first_spans(questions, config.grid.calibration_images)
    arguments = config.model.dtype, config.prompt, fit, list(retentions)
    fitted = call_on_cluster(config, job.checkpoint, _fit, read, spans, job.checkpoint, *arguments)
    if fitted is None:
        raise UserError(f"grid.calibration_images: none of the first {config.grid.calibration_images} can be read")
    recipes = {**known, **dict(zip(retentions, fitted, strict=True))}
    stored = {**_basis(config, job.checkpoint), "recipes": {str(r): recipe for r, recipe in recipes.items()}}
    output.write(FILE, json.dumps(stored).encode())
    return recipes


def _basis(config: AccuracyConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the recipes were fitted to; stored recipes with another basis are not used."""
    fitted = {"budget": "as executed", "attention": "of the pruned model"}  # other rules than earlier versions had
    return {"model": checkpoint.digest, "images": config.grid.calibration_images, **fitted}


def _fit(
    read: ReadQuestions,
    spans: list[SpanRow],
    checkpoint: Checkpoint,
    dtype: str,
    prompt: PromptConfig,
    fit: Fit,
    retentions: list[float],
) -> list[dict[int, int]] | None:
    """Fits one recipe for each retention, in the Ray task; None if no image can be read.

    Every image is read with one of its questions. The number of the question advances from image to image, so that the
    sample mixes the kinds of questions.

    Raises:
        RuntimeError: if a unit cannot be read.
    """
    pictures = []
    for span in spans:
        for row in read(span.to_row()):
            unit_batch = UnitBatch.from_row(row)
            if unit_batch.error is not None:
                raise RuntimeError(unit_batch.error)
            frames = unit_batch.frames(checkpoint.geometry)
            for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
                if image.num_pictures == 1:
                    text = image.prompts[len(pictures) % len(image.prompts)]
                    pictures.append((frames[rows.start], image.sizes[0], text))
    sample = read_sample(checkpoint, pictures, dtype=dtype, prompt=prompt)
    return fit.values(sample, retentions) if pictures else None
