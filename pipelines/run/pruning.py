"""Pruning inside the language model at the budget of a selector: settings that match FLOPs, checked on the driver.

A selector's `prune.retention` keeps k of N tokens in every layer. A method inside the model sees all of them in its
first layers, so equal budgets mean equal work: the method gets the smallest setting whose prefill costs no less than
the selector's, counted with three FFN matrices and the whole prompt (`otprune.flops`), as this package runs it; what
choosing the tokens costs is left out on both sides. Where even its smallest setting costs more, it gets that one; the
log says what both cost.
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from otprune.budget import layer_rows, make_policy, match_budget
from otprune.flops import prefill_flops
from otprune.layerwise.executor import MODEL_TYPES
from otprune.methods import check_settings, get_method
from otprune.models import Checkpoint
from otprune.models.prompts import encode_prompt
from otprune.models.relevance import find_clip
from otprune.reducers import m3_grids
from pipelines.config.keys import Config

logger = logging.getLogger(__name__)


def resolve_pruning(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The method's settings for the checkpoint, complete; {} where retention says it all.

    Raises:
        ValueError: settings that do not fit the method or the model.
    """
    method, settings = config.prune.method, check_settings(config.prune.method, config.prune.settings)
    if method == "cdpruner" and settings["relevance"] == "clip":
        find_clip(settings)
    if method == "m3" and settings["grid"] is not None:
        grids = m3_grids(checkpoint.vision.num_patches)
        if settings["grid"] not in grids:
            raise ValueError(f"settings.grid must be one of {grids} for this model, got {settings['grid']}")
    if get_method(method).kind != "in_llm":
        return settings
    if checkpoint.language_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"method {method} runs language models {known}, got {checkpoint.language_type}")
    if checkpoint.has_tiles and method != "vtw":
        raise ValueError(f"method {method} takes images of one size: of LLaVA-1.6 it cannot be told what to keep")
    if method == "fitprune":
        settings["recipe"] = read_recipe(settings["recipe"], checkpoint)
    shape, text, visual = checkpoint.language, num_text(config, checkpoint), checkpoint.most_visual_tokens
    try:
        matched, share, wanted = match_budget(method, settings, config.prune.retention, shape, text, visual)
        make_policy(method, matched).events(shape.layers)
    except ValueError as error:
        raise ValueError(f"settings of {method} must fit the model: {error}") from error
    line = "%s %s: prefill at %.1f %% of unpruned, a selector's at %.1f %%"
    logger.info(line, method, matched, 100 * share, 100 * wanted)
    return matched


def read_recipe(recipe: Any, checkpoint: Checkpoint) -> dict[int, int]:
    """The recipe itself, from wherever `settings.recipe` has it; warns if it was fitted to another model.

    Raises:
        ValueError: if there is none, or the file is no calibration's.
    """
    if recipe is None:
        raise ValueError("settings.recipe must be set: jobs/calibrate.py fits one to your images and prune.retention")
    if isinstance(recipe, str):
        file = recipe
        try:
            stored = json.loads(Path(file).read_text())
            recipe, fitted_to = stored["recipe"], stored["model"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"settings.recipe must be a file of jobs/calibrate.py: {error!r}") from error
        if fitted_to != checkpoint.digest:
            logger.warning("%s was fitted to another model than %s", file, checkpoint.path)
    return check_settings("fitprune", {"recipe": recipe})["recipe"]


def prefill_flops_of(config: Config, checkpoint: Checkpoint, settings: dict[str, Any], num_prompt_tokens: int) -> int:
    """Multiply-adds of the language model on a prompt, by the method with its resolved settings."""
    shape = checkpoint.language
    if get_method(config.prune.method).kind != "in_llm":
        return prefill_flops(shape, num_prompt_tokens)
    visual = checkpoint.most_visual_tokens
    if checkpoint.has_tiles:
        visual = min(visual, max(num_prompt_tokens - num_text(config, checkpoint), 1))
    rows = layer_rows(config.prune.method, settings, visual, shape.layers)
    return prefill_flops(shape, max(num_prompt_tokens - visual, 0), visual=rows)


def num_text(config: Config, checkpoint: Checkpoint) -> int:
    """Text tokens of the configured prompt in its conversation format, columns left as they stand."""
    return _count_text(config.prompt.template, config.prompt.conversation, checkpoint)


@cache  # every progress point asks, and loading a tokenizer takes a second
def _count_text(template: str, conversation: str, checkpoint: Checkpoint) -> int:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    ids = encode_prompt(template, conversation, checkpoint.path, tokenizer, checkpoint.image_token)
    return sum(map(len, ids))
