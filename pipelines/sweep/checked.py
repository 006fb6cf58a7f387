"""Checks a sweep before it runs: its grid, its models and its output."""

from dataclasses import dataclass

from pipelines.config.keys import Config
from pipelines.errors import UserError
from pipelines.run.job import ENGINES_OWN, Actors
from pipelines.store import STORE_ERRORS, Store, make_store
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.grid import Point, make_points

NOT_IN_SWEEP = ("run.estimate", "gate.min_quality")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked sweep: its configuration, its points in the order in which they run, and its output."""

    config: SweepConfig
    points: list[Point]
    output: Store
    actors: Actors = ENGINES_OWN


def prepare_sweep(config: SweepConfig, actors: Actors = ENGINES_OWN) -> Sweep:
    """Makes the points and checks them and the output. Takes seconds and starts no Ray.

    Raises:
        UserError: for anything that the user has to correct.
    """
    for name in NOT_IN_SWEEP:
        if config.dotted()[name] != Config().dotted()[name]:
            raise UserError(f"{name} cannot be set for a sweep, which runs and measures every point")
    points = make_points(config)
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    try:
        output.write(".probe", b"")
        output.delete(".probe")
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} must be writable: {type(error).__name__}: {error}") from error
    return Sweep(config, points, output, actors)
