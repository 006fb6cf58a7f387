"""Resolves the settings of a method on the driver, and matches the FLOPs of a method inside the language model.

By `prune.retention`, a selector keeps k of N visual tokens in every layer. A method inside the language model sees all
N tokens in its first layers, so an equal budget means equal work: the method gets the smallest setting whose prefill
costs no less than the selector's. If even its smallest setting costs more, the method gets that one. The log names both
costs.

`otprune.flops` counts the prefill as this package runs it, with three FFN matrices and the whole prompt. The cost of
choosing the tokens is left out on both sides.
"""

import json
import logging
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from otprune.budget import layer_rows, match_budget
from otprune.flops import prefill_flops
from otprune.layerwise.executor import MODEL_TYPES
from otprune.methods import InModel, Method, Reducer, get_method
from otprune.models import Checkpoint, Prompter, load_prompter
from otprune.models.relevance import check_relevance
from otprune.shapes import VisionShape
from pipelines.config.keys import Config

logger = logging.getLogger(__name__)


def resolve_pruning(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The complete settings of the method for the checkpoint; {} if the retention is all that the method needs.

    Raises:
        ValueError: if the settings do not fit the method or the model.
    """
    method = get_method(config.prune.method)
    settings = method.check(config.prune.settings)
    if reason := checkpoint.record.refuses(method, checkpoint, settings):
        raise ValueError(reason)
    if "relevance" in method.requires:
        check_relevance(settings)
    if config.prune.merge is not None and (method.makes_tokens or method.inside_model or method.before_projector):
        raise ValueError(f"merge must be null with {method.name}, which keeps no tokens as they are")
    if isinstance(method, Reducer) and method.fits is not None and isinstance(checkpoint.vision, VisionShape):
        method.fits(checkpoint.vision.num_patches, **settings)
    if isinstance(method, Reducer) and method.calibrate is not None:
        settings = {key: read_setting(method, key, value, checkpoint) for key, value in settings.items()}
    if not isinstance(method, InModel):
        return settings
    return _resolve_inside(config, method, settings, checkpoint)


def _resolve_inside(
    config: Config, method: InModel, settings: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Replaces each None in the settings by the value that matches the budget, and each file by its content."""
    name = method.name
    if checkpoint.language_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"method {name} runs language models {known}, got {checkpoint.language_type}")
    settings = {key: read_setting(method, key, value, checkpoint) for key, value in settings.items()}
    shape, text, visual = checkpoint.language, num_text(config, checkpoint), checkpoint.geometry.most_visual
    try:
        matched, share, wanted = match_budget(method, settings, config.prune.share, shape, text, visual)
        method.policy(**matched).events(shape.layers)
    except ValueError as error:
        raise ValueError(f"settings of {name} must fit the model: {error}") from error
    line = "%s %s: prefill at %.1f %% of unpruned, a selector's at %.1f %%"
    logger.info(line, name, matched, 100 * share, 100 * wanted)
    return matched


def read_setting(method: Method, name: str, value: Any, checkpoint: Checkpoint) -> Any:
    """The value of the setting `name`. A file of jobs/calibrate.py is replaced by the value that it holds.

    Logs a warning if the file was fitted to another model.

    Raises:
        ValueError: if a method that is fitted to data lacks the setting, or jobs/calibrate.py did not write the file.
    """
    if not method.settings[name].kind.endswith("or file"):
        return value
    fitted = isinstance(method, Reducer) or (isinstance(method, InModel) and method.fit and method.fit.setting == name)
    if value is None and fitted:
        raise ValueError(f"settings.{name} must be set: jobs/calibrate.py fits one to your images and prune.retention")
    if not isinstance(value, str):
        return value
    try:
        stored = json.loads(Path(value).read_text())
        found, fitted_to = stored[name], stored["model"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"settings.{name} must be a file of jobs/calibrate.py: {error!r}") from error
    if fitted_to != checkpoint.digest:
        logger.warning("%s was fitted to another model than %s", value, checkpoint.path)
    return method.check({name: found})[name]


def prefill_flops_of(config: Config, checkpoint: Checkpoint, settings: dict[str, Any], num_prompt_tokens: int) -> int:
    """Multiply-adds of the language model's prefill, by the configured method with its resolved settings.

    Args:
        num_prompt_tokens: tokens of the prompt with the visual tokens that enter the language model.
    """
    shape = checkpoint.language
    if not get_method(config.prune.method).inside_model:
        return prefill_flops(shape, num_prompt_tokens)
    visual = checkpoint.geometry.most_visual
    if checkpoint.geometry.fixed is None:  # smaller images have fewer tokens, so the prompt tells their number
        visual = min(visual, max(num_prompt_tokens - num_text(config, checkpoint), 1))
    rows = layer_rows(config.prune.method, settings, visual, shape.layers)
    return prefill_flops(shape, max(num_prompt_tokens - visual, 0), visual=rows)


def num_text(config: Config, checkpoint: Checkpoint) -> int:
    """Number of text tokens of the configured prompt in its conversation format. `{column}` counts as it stands."""
    return count_text(config.prompt.template, config.prompt.conversation, config.prompt.system, checkpoint)


@cache  # every progress point calls this
def count_text(template: str, conversation: str, system: str, checkpoint: Checkpoint) -> int:
    """As `num_text`, of one template."""
    return sum(map(len, prompter_of(checkpoint).encode_prompt(template, conversation, system=system)))


@lru_cache(maxsize=1)
def prompter_of(checkpoint: Checkpoint) -> Prompter:
    """`load_prompter`, which takes a second."""
    return load_prompter(checkpoint)
