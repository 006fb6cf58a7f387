"""What of a configuration decides the captions."""

import json
from typing import Any

import otprune
from otprune.models import Checkpoint, weights_digest
from otprune.models.relevance import find_clip
from pipelines.config.keys import Config
from pipelines.engines.registry import identity

SECTIONS = ("prompt", "prune", "decode")
KEYS = (
    "model.path",
    "model.dtype",
    "generate.max_new_tokens",
    "generate.temperature",
    "generate.top_p",
    "generate.seed",
    "input.image_column",
    "input.id_column",
)


def describe(config: Config, checkpoint: Checkpoint, pruning: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys and values that the fingerprint stands for; `pruning` are resolved settings, if any."""
    chosen = {k: v for k, v in config.dotted().items() if k in KEYS or k.split(".")[0] in SECTIONS}
    described = {**chosen, **identity(config), "model.weights": checkpoint.digest, "version": otprune.__version__}
    if config.prune.settings.get("clip"):  # cdpruner's, whose weights decide as well
        described["prune.clip.weights"] = weights_digest(find_clip(config.prune.settings))
    if pruning:
        described["prune.resolved"] = pruning
    return json.loads(json.dumps(described))  # as it is read back: keys of dicts are text
