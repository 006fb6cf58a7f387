"""An engine as the rest of a job knows it: one record, and no other place asks for an engine by its name.

A file of an engine exports its record as `ENGINE`; registry.py lists the files. Records import neither torch nor the
engine's own library: the actor's class is imported when the stages are made, and its library in the actor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config

if TYPE_CHECKING:  # both import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place


def whole_identity(config: Config) -> dict[str, Any]:
    """Every argument that the user gives the engine, by dotted key."""
    engine = config.engine
    return {
        **{f"engine.kwargs.{name}": value for name, value in sorted(engine.kwargs.items())},
        **{f"engine.sampling.{name}": value for name, value in sorted(engine.sampling.items())},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What decodes the prompts, seen from outside its actors."""

    name: str  # as `engine.name` has it
    check: Callable[[Config], None]
    """Raises UserError for what the engine cannot do."""
    actor: Callable[[], type]
    """Imports the class of the generate stage's actor."""
    arguments: Callable[["Config", "Checkpoint", dict[str, Any], "Place"], dict[str, Any]]
    """Keyword arguments of the actor: of a configuration, its checkpoint, the method's resolved settings, a place."""
    identity: Callable[[Config], dict[str, Any]] = whole_identity
    """What of `engine.*` decides the answers beside the name, by dotted key: it is part of the fingerprint."""
    prunes_inside: bool = False
    """Whether it runs methods that delete tokens between the layers of the language model."""
    takes_images: Callable[["Config", "Checkpoint"], bool] = lambda config, checkpoint: False
    """Whether it encodes the images itself, so that the job has no encode stage."""
    num_workers: Callable[[Config], int] = lambda config: 1
    """GPUs of one engine, where there are GPUs."""
    bundles: Callable[[Config], list[dict[str, float]]] = lambda config: []
    """Resources of each process that one engine starts through Ray; none if the engine lives within its actor."""
    units_in_flight: Callable[[Config], int] = lambda config: 1
    """Units that an actor works on at once; above 1 the actor's `__call__` is a coroutine."""
    max_restarts: Callable[[Config], int | None] = lambda config: None
    """Actors that may die one after the other, with no unit finished in between; None sets no limit."""


def collect(*engines: Engine) -> dict[str, Engine]:
    """The engines by name.

    Raises:
        ValueError: if two have one name.
    """
    found = {engine.name: engine for engine in engines}
    if len(found) < len(engines):
        raise ValueError(f"engines must have different names, got {', '.join(engine.name for engine in engines)}")
    return found
