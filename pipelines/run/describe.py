"""Describes a configuration by the keys that decide the captions. The fingerprint is a hash of this description."""

import json
from typing import Any

import otprune
from otprune.models import Checkpoint, weights_digest
from otprune.models.relevance import find_clip
from pipelines.config.keys import Config
from pipelines.engines.registry import identity
from pipelines.secrets import deciding as secretless

SECTIONS = ("prompt", "prune", "decode")
KEYS = (
    "model.path",
    "model.dtype",
    "model.max_pixels",
    "model.min_pixels",
    "model.max_tiles",
    "model.original_tiles",
    "generate.max_new_tokens",
    "generate.temperature",
    "generate.top_p",
    "generate.seed",
    "generate.retries",
    "generate.retry_cut",
    "input.image_column",
    "input.id_column",
)
UNSET = (
    *("model.max_pixels", "model.min_pixels", "model.max_tiles", "model.original_tiles"),
    *("prompt.system", "prune.shrink", "prune.merge", "generate.retries", "generate.retry_cut"),
)
"""Keys that decide nothing while they are null, empty, 0 or false."""


def describe(config: Config, checkpoint: Checkpoint, pruning: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys and values behind the fingerprint, as JSON reads them back: keys of dicts are text. No secret is one.

    Args:
        pruning: resolved settings of a method inside the language model; None leaves them out.
    """
    given = {k: v for k, v in config.dotted().items() if k in KEYS or k.split(".")[0] in SECTIONS}
    for name in UNSET:  # as if the key did not exist, so that outputs from before it did can be resumed
        if not given[name]:
            del given[name]
    described = {
        **given,
        **secretless(identity(config)),
        "model.weights": checkpoint.digest,
        "version": otprune.__version__,
    }
    if config.prune.settings.get("clip"):  # of cdpruner, which chooses tokens by this CLIP
        described["prune.clip.weights"] = weights_digest(find_clip(config.prune.settings))
    if pruning:
        described["prune.resolved"] = pruning
    return json.loads(json.dumps(described))  # compares equal to a stored description
