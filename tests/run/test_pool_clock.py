"""The clock of a run's actor pools: which stage an operator is, what Ray's loop adds to it, and the share it gives."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.run import watchdog
from pipelines.run.pool_clock import POOL_CLOCK, PoolClock
from pipelines.run.watchdog import PoolWatch
from tests.helpers import fake_encoder, fake_generator, killing


def following(**actors: type) -> PoolClock:
    clock = PoolClock()
    clock.follow(actors)
    return clock


class FakeExecutor:
    """What PoolWatch reads of Ray Data's executor: operators by name, each with a pool of actors or without one."""

    def __init__(self, clock: PoolClock | None, **pools: tuple[int, int, int]):
        """Name -> running, pending and active actors."""
        self._data_context = SimpleNamespace(get_config={POOL_CLOCK: clock}.get)
        self._topology: list[Any] = [SimpleNamespace(name="FlatMap(ReadDecode)")]
        for name, (running, pending, active) in pools.items():
            pool = SimpleNamespace(
                num_running_actors=lambda n=running: n,
                num_pending_actors=lambda n=pending: n,
                num_active_actors=lambda n=active: n,
            )
            self._topology.append(SimpleNamespace(name=f"Map({name})", _actor_pool=pool))


def test_an_operator_is_found_by_the_class_of_its_actors_wherever_it_stands():
    clock = following(encode=killing(fake_encoder(), set()), generate=fake_generator())
    assert clock.stage_of("Map(Killing)") == "encode"
    assert clock.stage_of("FlatMap(ReadDecode)->Map(FakeGenerator)") == "generate"
    assert clock.stage_of("Map(Sink)") is None
    assert following(generate=fake_generator()).stage_of("Map(FakeGenerator)") == "generate", "no encode stage at all"


def test_stages_whose_actor_classes_have_one_name_are_refused():
    with pytest.raises(ValueError, match="must differ by name"):
        following(encode=killing(fake_encoder(), set()), generate=killing(fake_generator(), set()))


def test_rays_loop_counts_the_held_and_the_busy_actors_of_each_stage(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    clock = following(encode=fake_encoder(), generate=fake_generator())
    watch = PoolWatch()
    for seconds in (1.0, 2.0):
        now[0] += seconds
        watch.on_execution_step(FakeExecutor(clock, FakeEncoder=(2, 1, 1), FakeGenerator=(1, 0, 0), Other=(9, 9, 9)))
    assert dict(clock.held) == {"encode": 9.0, "generate": 3.0}
    assert dict(clock.active) == {"encode": 3.0, "generate": 0.0}
    watch.on_execution_step(FakeExecutor(None, FakeEncoder=(2, 1, 1)))  # a flow without a clock


def test_copies_of_rays_data_context_count_on_the_same_clock():
    clock = PoolClock()
    copy.deepcopy({"clock": clock})["clock"].count("encode", 2.0, 1.0)
    assert clock.held["encode"] == 2.0
    assert pickle.loads(pickle.dumps(clock)).held["encode"] == 2.0  # tasks get the context by value


@pytest.mark.parametrize(
    ("held", "active", "worked", "share"),
    [(10, 8, 5, 0.5), (10, 8, 20, 0.8), (10, 12, 20, 1.0), (0, 0, 5, None)],
)
def test_the_share_is_bounded_by_the_time_with_work_and_by_the_time_held(held, active, worked, share):
    clock = PoolClock()
    clock.count("encode", held, active)
    assert clock.busy_share("encode", worked) == share
