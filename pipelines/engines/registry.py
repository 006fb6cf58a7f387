"""The engines that a job can run with, and what is asked of the one that it is configured with."""

from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config
from pipelines.engines import transformers_engine, vllm_engine
from pipelines.engines.engine import Engine, collect
from pipelines.errors import UserError

if TYPE_CHECKING:  # it imports torch
    from otprune.models import Checkpoint

ENGINES = collect(transformers_engine.ENGINE, vllm_engine.ENGINE)


def get_engine(config: Config) -> Engine:
    """Raises UserError unless `engine.name` is an engine's."""
    if config.engine.name not in ENGINES:
        raise UserError(f"engine.name must be one of {', '.join(ENGINES)}, got {config.engine.name!r}")
    return ENGINES[config.engine.name]


def check_engine(config: Config) -> None:
    """Refuses what the configured engine cannot do.

    Raises:
        UserError: an unknown engine, a method inside the language model that it does not run, or what its own check
            refuses.
    """
    from otprune.methods import METHODS  # imports torch, which nobody needs who only looks at the records

    engine, method = get_engine(config), METHODS.get(config.prune.method)
    if method is not None and method.inside_model and not engine.prunes_inside:
        able = " or ".join(each.name for each in ENGINES.values() if each.prunes_inside)
        raise UserError(
            f"engine.name must be {able} with prune.method={config.prune.method}, got {engine.name}: the method "
            f"deletes tokens between the layers of the language model, which {engine.name} runs as a whole"
        )
    engine.check(config)


def identity(config: Config) -> dict[str, Any]:
    """What of the engine decides the answers, by dotted key."""
    engine = get_engine(config)
    return {"engine.name": engine.name, **engine.identity(config)}


def takes_images(config: Config, checkpoint: "Checkpoint | None") -> bool:
    """Whether the engine encodes the images itself; without a checkpoint it does not."""
    return checkpoint is not None and get_engine(config).takes_images(config, checkpoint)
