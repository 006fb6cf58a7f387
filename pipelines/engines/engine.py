"""The record of an engine: everything that the rest of a job may ask about the engine.

The module of an engine exports its record as `ENGINE`, and registry.py lists the modules. No code compares the name of
an engine. A record imports neither torch nor the engine's library: the class of the actor is imported when the stages
are made, and the library is imported in the actor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config

if TYPE_CHECKING:  # both import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place


def whole_identity(config: Config) -> dict[str, Any]:
    """Every argument that the user passes to the engine, by dotted key."""
    engine = config.engine
    return {
        **{f"engine.kwargs.{name}": value for name, value in sorted(engine.kwargs.items())},
        **{f"engine.sampling.{name}": value for name, value in sorted(engine.sampling.items())},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """An engine as seen from outside its actors."""

    name: str  # value of `engine.name`
    check: Callable[[Config], None]
    """Raises UserError if the engine cannot run the configuration."""
    actor: Callable[[], type]
    """Imports and returns the class of the generate stage's actor."""
    arguments: Callable[["Config", "Checkpoint", dict[str, Any], "Place"], dict[str, Any]]
    """Keyword arguments of the actor, from configuration, checkpoint, the method's resolved settings, and place."""
    identity: Callable[[Config], dict[str, Any]] = whole_identity
    """The keys of `engine.*` that decide the answers, with values, without the name. The fingerprint includes them."""
    prunes_inside: bool = False
    """Whether the engine runs methods that delete tokens between the layers of the language model."""
    takes_images: Callable[["Config", "Checkpoint"], bool] = lambda config, checkpoint: False
    """Whether the engine encodes the images itself. The job then has no encode stage."""
    num_workers: Callable[[Config], int] = lambda config: 1
    """Number of GPUs that one engine takes on a cluster with GPUs."""
    bundles: Callable[[Config], list[dict[str, float]]] = lambda config: []
    """Resources of each process that one engine starts through Ray. Empty if the engine lives within its actor."""
    units_in_flight: Callable[[Config], int] = lambda config: 1
    """Number of units that an actor works on at once. Above 1 the actor's `__call__` must be a coroutine."""
    max_restarts: Callable[[Config], int | None] = lambda config: None
    """Number of actors that may die in a row before one finishes a unit. None sets no limit."""


def collect(*engines: Engine) -> dict[str, Engine]:
    """The engines by name.

    Raises:
        ValueError: if two engines have the same name.
    """
    by_name = {engine.name: engine for engine in engines}
    if len(by_name) < len(engines):
        raise ValueError(f"engines must have different names, got {', '.join(engine.name for engine in engines)}")
    return by_name
