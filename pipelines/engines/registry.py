"""The engines that a job can run with, and the questions that a job asks its configured engine."""

from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config
from pipelines.engines import transformers_engine, vllm_engine
from pipelines.engines.engine import Engine, collect
from pipelines.errors import UserError

if TYPE_CHECKING:  # the module imports torch
    from otprune.models import Checkpoint

ENGINES = collect(transformers_engine.ENGINE, vllm_engine.ENGINE)


def get_engine(config: Config) -> Engine:
    """The engine that `engine.name` names.

    Raises:
        UserError: if there is no engine of this name.
    """
    if config.engine.name not in ENGINES:
        raise UserError(f"engine.name must be one of {', '.join(ENGINES)}, got {config.engine.name!r}")
    return ENGINES[config.engine.name]


def check_engine(config: Config) -> None:
    """Refuses a configuration that its engine cannot run.

    Raises:
        UserError: if the engine is unknown, does not run the configured method inside the language model, or refuses
            the configuration in its own check.
    """
    from otprune.methods import METHODS  # imports torch, which a caller that only reads the records must not load

    engine, method = get_engine(config), METHODS.get(config.prune.method)
    if method is not None and method.inside_model and not engine.prunes_inside:
        capable = " or ".join(candidate.name for candidate in ENGINES.values() if candidate.prunes_inside)
        raise UserError(
            f"engine.name must be {capable} with prune.method={config.prune.method}, got {engine.name}: the method "
            f"deletes tokens between the layers of the language model, which {engine.name} runs as a whole"
        )
    engine.check(config)


def check_family(config: Config, checkpoint: "Checkpoint") -> None:
    """Refuses a model that the engine does not run.

    Raises:
        UserError: with engine.name=vllm, for a family that refuses it.
    """
    if config.engine.name == "vllm" and (reason := checkpoint.record.refuses_vllm):
        raise UserError(f"engine.name must be transformers for {checkpoint.name}, got vllm: {reason}")


def identity(config: Config) -> dict[str, Any]:
    """The keys of `engine.*` that decide the answers, with their values, by dotted key."""
    engine = get_engine(config)
    return {"engine.name": engine.name, **engine.identity(config)}


def takes_images(config: Config, checkpoint: "Checkpoint | None") -> bool:
    """Whether the engine encodes the images itself. False without a checkpoint."""
    return checkpoint is not None and get_engine(config).takes_images(config, checkpoint)
