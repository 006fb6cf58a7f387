"""Counts the actor-seconds of one run: how long the actors of each stage were held, and how long they had work."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

POOL_CLOCK = "pool_clock"  # key of the data context's own configuration: the clock of the run, or None


class PoolClock:
    """Adds up the actor-seconds of each stage of a run.

    One thread counts: Ray's executor, or the driver in a local flow. Other threads may read.
    `held` counts every actor from its start to its end, and `active` counts an actor while it has a unit.
    """

    def __init__(self) -> None:
        self.held = defaultdict[str, float](float)
        self.active = defaultdict[str, float](float)
        self._stages: dict[str, str] = {}  # name of the actor class -> stage

    def follow(self, actors: Mapping[str, type]) -> None:
        """Tells the clock which actor class works in which stage.

        Raises:
            ValueError: if two stages have actor classes of one name: Ray names a pool by the class alone.
        """
        self._stages = {actor.__name__: stage for stage, actor in actors.items()}
        if len(self._stages) < len(actors):
            raise ValueError(f"actor classes must differ by name, got {[actor.__name__ for actor in actors.values()]}")

    def stage_of(self, operator: str) -> str | None:
        """The stage of an operator of Ray Data, named such as `Map(Encoder)`; None if no stage has this operator."""
        names = re.findall(r"\((\w+)\)", operator)  # several if Ray fused operators: FlatMap(Read)->Map(Encoder)
        return next((self._stages[name] for name in names if name in self._stages), None)

    def count(self, stage: str, held: float, active: float) -> None:
        """Adds actor-seconds of a stage."""
        self.held[stage] += held
        self.active[stage] += active

    def busy_share(self, stage: str, worked: float) -> float | None:
        """Share of the held time in which the actors of the stage worked; None if no actor was held.

        `worked` is the sum over units of the seconds that an actor worked on them. Units that overlap in one actor make
        `worked` larger than the time of the actor, so the share is never above that of `active`, or above 1.
        """
        held = self.held[stage]
        return min(worked, self.active[stage], held) / held if held > 0 else None

    def __deepcopy__(self, memo: Any) -> "PoolClock":
        """Itself. Ray copies its data context several times on the way to the executor; all copies must count here."""
        return self
