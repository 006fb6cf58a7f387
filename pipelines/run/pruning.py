"""Pruning inside the language model at the budget of a selector: settings that match FLOPs, checked on the driver.

A selector's `prune.retention` keeps k of N tokens in every layer. A method inside the model sees all of them in its
first layers, so equal budgets mean equal work: the method gets the smallest setting whose prefill costs no less than
the selector's, counted with three FFN matrices and the whole prompt (`otprune.flops`), as this package runs it; what
choosing the tokens costs is left out on both sides. Where even its smallest setting costs more, it gets that one; the
log says what both cost.
"""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from otprune.budget import layer_rows, match_budget
from otprune.flops import prefill_flops
from otprune.layerwise.executor import MODEL_TYPES
from otprune.methods import InModel, Reducer, get_method
from otprune.models import weights_digest
from otprune.models.checkpoint import ANYRES, read_config
from otprune.models.prompts import encode_prompt
from otprune.models.relevance import check_relevance
from otprune.shapes import LanguageShape
from pipelines.config.keys import Config

logger = logging.getLogger(__name__)


def resolve_pruning(config: Config, model: Path) -> dict[str, Any]:
    """The method's settings for the checkpoint in `model`, complete; {} where retention says it all.

    Raises:
        ValueError: settings that do not fit the method or the model, or an engine that cannot run it.
    """
    method = get_method(config.prune.method)
    settings = method.check(config.prune.settings)
    if "relevance" in method.requires:
        check_relevance(settings)
    if isinstance(method, Reducer) and method.fits is not None:
        method.fits(num_patches(model), **settings)
    if not isinstance(method, InModel):
        return settings
    return _resolve_inside(config, method, settings, model)


def _resolve_inside(config: Config, method: InModel, settings: dict[str, Any], model: Path) -> dict[str, Any]:
    """What is None in the settings by the budget, what is a file by its content."""
    name = method.name
    language = AutoConfig.from_pretrained(model).text_config
    if language.model_type not in MODEL_TYPES:
        raise ValueError(f"method {name} runs language models {', '.join(MODEL_TYPES)}, got {language.model_type}")
    if has_tiles(model) and not method.takes_tiles:
        raise ValueError(f"method {name} takes images of one size: of LLaVA-1.6 it cannot be told what to keep")
    if config.engine.name != "transformers":
        raise ValueError(f"method {name} prunes inside the model: engine.name must be transformers")
    settings = {key: read_counts(method, key, value, model) for key, value in settings.items()}
    shape, text = LanguageShape.from_config(language), num_text(config, model)
    try:
        matched, share, wanted = match_budget(method, settings, config.prune.retention, shape, text, num_visual(model))
        method.policy(**matched).events(shape.layers)
    except ValueError as error:
        raise ValueError(f"settings of {name} must fit the model: {error}") from error
    line = "%s %s: prefill at %.1f %% of unpruned, a selector's at %.1f %%"
    logger.info(line, name, matched, 100 * share, 100 * wanted)
    return matched


def read_counts(method: InModel, name: str, value: Any, model: Path) -> Any:
    """The setting `name` as it is, or, of the kind that a file may hold, out of the file; warns if the file was fitted
    to another model.

    Raises:
        ValueError: if a method that is fitted to data lacks the setting, or the file is no calibration's.
    """
    if method.settings[name].kind != "counts or file":
        return value
    if value is None and method.fit is not None and method.fit.setting == name:
        raise ValueError(f"settings.{name} must be set: jobs/calibrate.py fits one to your images and prune.retention")
    if not isinstance(value, str):
        return value
    try:
        stored = json.loads(Path(value).read_text())
        counts, fitted_to = stored[name], stored["model"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"settings.{name} must be a file of jobs/calibrate.py: {error!r}") from error
    if fitted_to != weights_digest(model):
        logger.warning("%s was fitted to another model than %s", value, model)
    return method.check({name: counts})[name]


def num_patches(model: Path) -> int:
    """Patches of one square image."""
    vision = AutoConfig.from_pretrained(model).vision_config
    return (vision.image_size // vision.patch_size) ** 2


def num_visual(model: Path) -> int:
    """Visual tokens of an image: of LLaVA-1.6 those of the most crops, 2,880, newlines and padding not counted."""
    if not has_tiles(model):
        return num_patches(model)
    config = AutoConfig.from_pretrained(model)
    side = config.vision_config.image_size
    return num_patches(model) * (1 + max(height * width // side**2 for height, width in config.image_grid_pinpoints))


def prefill_flops_of(config: Config, model: Path, settings: dict[str, Any], num_prompt_tokens: int) -> int:
    """Multiply-adds of the language model on a prompt, by the method with its resolved settings."""
    shape = LanguageShape.from_config(AutoConfig.from_pretrained(model).text_config)
    if not get_method(config.prune.method).inside_model:
        return prefill_flops(shape, num_prompt_tokens)
    visual = num_visual(model)
    if has_tiles(model):
        visual = min(visual, max(num_prompt_tokens - num_text(config, model), 1))
    rows = layer_rows(config.prune.method, settings, visual, shape.layers)
    return prefill_flops(shape, max(num_prompt_tokens - visual, 0), visual=rows)


def has_tiles(model: Path) -> bool:
    """Whether the checkpoint is a LLaVA-1.6, whose images have different numbers of tokens."""
    return read_config(model)["model_type"] == ANYRES


def num_text(config: Config, model: Path) -> int:
    """Text tokens of the configured prompt in its conversation format, columns left as they stand."""
    image_token = AutoConfig.from_pretrained(model).image_token_index
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = encode_prompt(config.prompt.template, config.prompt.conversation, model, tokenizer, image_token)
    return sum(map(len, ids))
