"""The record of this package's own engine: transformers' language model, decoded by `otprune.models.decoding`.

The engine runs every method, including those inside the language model. Its input is visual tokens, never images.
"""

from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config
from pipelines.engines.engine import Engine
from pipelines.errors import UserError

if TYPE_CHECKING:  # both modules import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place


def check(config: Config) -> None:
    """Refuses engine arguments, which only other engines take.

    Raises:
        UserError: if `engine.kwargs` or `engine.sampling` is not empty.
    """
    for name, values in (("kwargs", config.engine.kwargs), ("sampling", config.engine.sampling)):
        if values:
            raise UserError(
                f"engine.{name} must be empty with engine.name=transformers, which takes none; got {', '.join(values)}"
            )


def actor() -> type:
    """The class `Generator`."""
    from pipelines.engines.transformers_actor import Generator  # imports torch

    return Generator


def arguments(config: Config, checkpoint: "Checkpoint", settings: dict[str, Any], place: "Place") -> dict[str, Any]:
    """Keyword arguments of `Generator`."""
    return {
        "checkpoint": checkpoint,
        "prompt": config.prompt,
        "generate": config.generate,
        "prune": config.prune,
        "settings": settings,
        "place": place,
    }


ENGINE = Engine(name="transformers", check=check, actor=actor, arguments=arguments, prunes_inside=True)
