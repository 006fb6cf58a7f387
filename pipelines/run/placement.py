"""Places actors on a cluster: actor pools, shares of a GPU and placement groups."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.data import ActorPoolStrategy
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

ACCELERATOR_SHARE = 0.001  # Ray selects a kind of accelerator by a tiny share of the resource of its name
SINK_CPUS = 0.25  # the sink mostly waits for the store


class PlacementGroups:
    """The placement groups of a pass.

    An actor that needs several GPUs, perhaps of several nodes, has a group of its own. So has each pair of an encode
    and a generate actor that share one GPU.
    """

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []
        self._pairs: list[PlacementGroup] = []

    def place(self, bundles: Sequence[dict[str, float]]) -> dict[str, Any]:
        """Remote arguments that put one more actor, and the actors it starts, into a new group of `bundles`."""
        group = placement_group(list(bundles), strategy="PACK")
        self._groups.append(group)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        return {"scheduling_strategy": strategy}

    def pair(self, bundle: dict[str, float], num_pairs: int, actors: Iterator[int]) -> dict[str, Any]:
        """Remote arguments of one more actor: the n-th actor of one stage shares a bundle with the n-th of the other.

        Without pairs, Ray puts each actor on the fullest GPU that still has room. Two encode actors of 0.3 GPU then
        share one GPU, and a generate actor of 0.7 GPU finds no place.

        Args:
            bundle: resources of one pair.
            num_pairs: actors beyond so many have no partner, and Ray places them.
            actors: counts the actors of this stage, from 0.
        """
        number = next(actors)
        if number >= num_pairs:
            return {}
        if number == len(self._pairs):
            self._pairs.append(placement_group([bundle]))
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._pairs[number], 0)}

    def remove(self) -> None:
        """Frees the resources of all groups. Ray does so when the driver ends, which is too late for the next pass."""
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
    units_at_once: int = 1  # in one actor; above 1 the `__call__` of the actor is a coroutine
    bundles: Sequence[dict[str, float]] = ()  # of the placement group of an actor and the actors it starts
    accelerator: str | None = None

    def all_bundles(self) -> list[dict[str, float]]:
        """`bundles`, or else one bundle of the CPUs and GPUs of an actor; with `accelerator`, on nodes of that kind."""
        kind = {f"accelerator_type:{self.accelerator}": ACCELERATOR_SHARE} if self.accelerator else {}
        bundles = self.bundles or ({"CPU": self.num_cpus, "GPU": self.num_gpus},)
        return [{**bundle, **kind} for bundle in bundles]

    def remote(
        self, num_units: int, retries: int, one_at_a_time: bool, place: Callable[[], dict[str, Any]] | None
    ) -> dict[str, Any]:
        """Keyword arguments of `Dataset.map`.

        A pool never has more actors than there are units. One unit waits in each actor while the actor works, so that
        no actor idles between units; `one_at_a_time` forgoes that. `place` gives the placement of the next actor.
        """
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
            "num_gpus": 0 if self.bundles else self.num_gpus,  # the bundles hold the GPUs
            "max_task_retries": retries,
            **({"ray_remote_args_fn": place} if place else {}),
            **({"accelerator_type": self.accelerator} if self.accelerator else {}),
        }


def share_a_gpu(encode: float, generate: float) -> bool:
    """Whether an encode and a generate actor of these GPU shares fit on one GPU together."""
    return encode > 0 and generate > 0 and encode + generate <= 1


def num_pairs(encode: Stage | None, generate: Stage, num_units: int) -> int:
    """Number of pairs of an encode and a generate actor that must share a GPU; 0 if Ray can place all actors itself."""
    if encode is None or generate.bundles or encode.accelerator != generate.accelerator:
        return 0
    # Only pools of a fixed size are paired. With one actor each, Ray finds the places itself.
    grows = any(stage.min_actors != stage.max_actors for stage in (encode, generate))
    share = share_a_gpu(encode.num_gpus, generate.num_gpus)
    if grows or not share or max(encode.min_actors, generate.min_actors) == 1:
        return 0
    return min(encode.min_actors, generate.min_actors, num_units)


def placers(
    encode: Stage | None, generate: Stage, num_units: int, groups: PlacementGroups
) -> list[Callable[[], dict[str, Any]] | None]:
    """(encode, generate): the functions that place the next actor of a stage. None leaves the actor to Ray."""
    if generate.bundles:
        return [None, partial(groups.place, generate.all_bundles())]
    if not (pairs := num_pairs(encode, generate, num_units)):
        return [None, None]
    assert encode is not None
    bundle: Counter[str] = Counter()
    for stage in (encode, generate):
        bundle.update(*stage.all_bundles())
    return [partial(groups.pair, dict(bundle), pairs, itertools.count()) for _ in (encode, generate)]
