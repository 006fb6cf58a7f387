"""Where actors live: pools, shares of a GPU, placement groups."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.data import ActorPoolStrategy
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

ACCELERATOR_SHARE = 0.001  # of its kind's resource, which is how Ray asks for an accelerator
SINK_CPUS = 0.25  # it mostly waits for the store


class PlacementGroups:
    """The placement groups of a pass: one for each actor that needs several GPUs, perhaps of several nodes, or for each
    pair of actors that share one."""

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []
        self._pairs: list[PlacementGroup] = []

    def place(self, bundles: Sequence[dict[str, float]]) -> dict[str, Any]:
        """Remote arguments that put one more actor, and all actors that it starts, into a group of its own."""
        group = placement_group(list(bundles), strategy="PACK")
        self._groups.append(group)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        return {"scheduling_strategy": strategy}

    def pair(self, bundle: dict[str, float], num_pairs: int, actors: Iterator[int]) -> dict[str, Any]:
        """Remote arguments of one more actor of a stage: the n-th shares a bundle with the other stage's n-th.

        Left to itself, Ray puts each on the fullest GPU that still has room: two encoders of 0.3 on one, and then a
        generator of 0.7 never finds its place.
        """
        number = next(actors)
        if number >= num_pairs:
            return {}
        if number == len(self._pairs):
            self._pairs.append(placement_group([bundle]))
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._pairs[number], 0)}

    def remove(self) -> None:
        """Frees what they hold; Ray itself would, when the driver ends, but the next pass needs it."""
        for group in self._groups + self._pairs:
            remove_placement_group(group)
        self._groups.clear()
        self._pairs.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """An actor stage: its class, constructor arguments and pool."""

    actor: type
    arguments: dict[str, Any]
    min_actors: int
    max_actors: int
    num_cpus: float
    num_gpus: float
    units_at_once: int = 1  # of one actor; above 1 its `__call__` is a coroutine
    bundles: Sequence[dict[str, float]] = ()  # of the placement group that an actor and the actors it starts live in
    accelerator: str | None = None

    def all_bundles(self) -> list[dict[str, float]]:
        """`bundles`, or without them what one actor holds of a node; of its kind of accelerator, if it asks for one."""
        kind = {f"accelerator_type:{self.accelerator}": ACCELERATOR_SHARE} if self.accelerator else {}
        held = self.bundles or ({"CPU": self.num_cpus, "GPU": self.num_gpus},)
        return [{**bundle, **kind} for bundle in held]

    def remote(
        self, num_units: int, retries: int, one_at_a_time: bool, place: Callable[[], dict[str, Any]] | None
    ) -> dict[str, Any]:
        """Keyword arguments of `Dataset.map`: never more actors than units, and one unit waits in each actor while
        others are worked on. `place` says where the next actor goes."""
        at_once = 1 if one_at_a_time else self.units_at_once
        pool = ActorPoolStrategy(
            min_size=min(self.min_actors, num_units),
            max_size=min(self.max_actors, num_units),
            max_tasks_in_flight_per_actor=1 if one_at_a_time else at_once + 1,
            max_concurrent_calls_per_actor=at_once,
        )
        return {
            "fn_constructor_kwargs": self.arguments,
            "compute": pool,
            "num_cpus": self.num_cpus,
            "num_gpus": 0 if self.bundles else self.num_gpus,  # the bundles hold them
            "max_task_retries": retries,
            **({"ray_remote_args_fn": place} if place else {}),
            **({"accelerator_type": self.accelerator} if self.accelerator else {}),
        }


def share_a_gpu(encode: float, generate: float) -> bool:
    """Whether an encode and a generate actor that hold so many GPUs can live on one."""
    return encode > 0 and generate > 0 and encode + generate <= 1


def num_pairs(encode: Stage | None, generate: Stage, num_units: int) -> int:
    """Pairs of an encode and a generate actor that have to share a GPU; 0 where Ray finds places by itself."""
    if encode is None or generate.bundles or encode.accelerator != generate.accelerator:
        return 0
    grows = any(stage.min_actors != stage.max_actors for stage in (encode, generate))
    share = share_a_gpu(encode.num_gpus, generate.num_gpus)
    if grows or not share or max(encode.min_actors, generate.min_actors) == 1:
        return 0
    return min(encode.min_actors, generate.min_actors, num_units)


def placers(
    encode: Stage | None, generate: Stage, num_units: int, groups: PlacementGroups
) -> list[Callable[[], dict[str, Any]] | None]:
    """Who says where the actors of both stages go; None leaves it to Ray."""
    if generate.bundles:
        return [None, partial(groups.place, generate.all_bundles())]
    if not (pairs := num_pairs(encode, generate, num_units)):
        return [None, None]
    assert encode is not None
    bundle: Counter[str] = Counter()
    for stage in (encode, generate):
        bundle.update(*stage.all_bundles())
    return [partial(groups.pair, dict(bundle), pairs, itertools.count()) for _ in (encode, generate)]
