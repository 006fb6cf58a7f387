"""The engine that this package brings itself: transformers' language model, decoded by `otprune.models.decoding`.

It runs every method, those inside the language model too, and takes pruned visual tokens alone.
"""

from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config
from pipelines.engines.engine import Engine
from pipelines.errors import UserError

if TYPE_CHECKING:  # both import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place


def check(config: Config) -> None:
    """Raises UserError if arguments are given: they belong to other engines."""
    for name, given in (("kwargs", config.engine.kwargs), ("sampling", config.engine.sampling)):
        if given:
            raise UserError(
                f"engine.{name} must be empty with engine.name=transformers, which takes none; got {', '.join(given)}"
            )


def actor() -> type:
    from pipelines.engines.transformers_actor import Generator  # imports torch

    return Generator


def arguments(config: Config, checkpoint: "Checkpoint", settings: dict[str, Any], place: "Place") -> dict[str, Any]:
    """Of `Generator`."""
    return {
        "checkpoint": checkpoint,
        "conversation": config.prompt.conversation,
        "generate": config.generate,
        "prune": config.prune,
        "settings": settings,
        "place": place,
    }


ENGINE = Engine(name="transformers", check=check, actor=actor, arguments=arguments, prunes_inside=True)
