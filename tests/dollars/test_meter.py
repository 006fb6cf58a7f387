"""Dollars: node-hours of nodes that come and go, where they went, and what is kept of the runs of an output."""

import pytest

from pipelines.dollars.attribution import (
    Attribution,
    attribute,
    price_again,
    price_run,
    price_steady,
    usd_per_million_images,
)
from pipelines.dollars.ledger import Spent, new_run, read_spent, record_run
from pipelines.dollars.meter import Meter, Tariff
from pipelines.dollars.prices import Price
from pipelines.store import Store

PRICES = (Price("a", 3.6), Price("b", 7.2, gpu="L4", count=1))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def node(name: str, instance: str = "", alive: bool = True, **resources: float) -> dict:
    labels = {"instance-type": instance} if instance else {}
    return {"NodeID": name, "Alive": alive, "Labels": labels, "Resources": resources}


def meter(clock: Clock, **tariff) -> Meter:
    return Meter(Tariff(PRICES, **tariff), clock.now, clock)


def test_nodes_are_billed_from_the_jobs_start_or_their_joining_to_their_leaving(clock):
    held = meter(clock)
    clock.now += 10  # the cluster is joined ten seconds after the start
    held.poll([node("1", "a", GPU=1)])
    clock.now += 10
    held.poll([node("1", "a"), node("2", "b", GPU=1)])
    assert held.usd_per_hour == pytest.approx(10.8)
    clock.now += 10
    held.poll([node("1", "a"), node("2", "b", alive=False)])
    assert held.usd_per_hour == pytest.approx(3.6)
    clock.now += 10
    assert held.node_seconds == {"a": 40, "b": 10}
    assert held.usd == pytest.approx((40 * 3.6 + 10 * 7.2) / 3600)
    assert held.capacity("GPU") == 40 * 1 + 10 * 1


def test_a_node_that_vanishes_from_the_list_has_left_and_may_come_back(clock):
    held = meter(clock)
    held.poll([node("1", "a")])
    clock.now += 5
    held.poll([])
    clock.now += 5
    assert held.node_seconds == {"a": 5}
    held.poll([node("1", "a")])
    assert held.node_seconds == {"a": 10}


def test_nodes_that_were_dead_before_the_job_cost_it_nothing(clock):
    held = meter(clock)
    held.poll([node("0", "b", alive=False), node("1", "a")])
    clock.now += 3600
    assert held.usd == pytest.approx(3.6)


def test_one_price_for_the_cluster_overrides_what_its_nodes_are(clock):
    held = meter(clock, usd_per_hour=1.0)
    held.poll([node("1", "a"), node("2", "never heard of")])
    clock.now += 1800
    assert (held.usd, held.usd_per_hour) == (pytest.approx(0.5), 1.0)
    assert not held.unpriced


def test_a_node_without_a_price_is_said_and_not_billed_as_another(clock):
    held = meter(clock)
    held.poll([node("1", "a"), node("2", CPU=4), node("3", CPU=8)])
    clock.now += 3600
    assert held.usd == pytest.approx(3.6)
    assert held.unpriced.total() == 2
    assert "neither an instance-type label" in next(iter(held.unpriced))


def test_without_any_price_there_are_no_dollars_but_node_seconds(clock):
    held = meter(clock)
    held.poll([node("1", CPU=4)])
    clock.now += 7
    assert (held.usd, held.usd_per_hour) == (None, None)
    assert held.node_seconds == {"unknown node": 7}


def test_a_stopped_meter_stands_still(clock):
    held = meter(clock, usd_per_hour=3600.0)
    clock.now += 2
    held.stop()
    clock.now += 100
    assert held.usd == pytest.approx(2)


def test_the_parts_of_the_dollars_add_up_and_idle_is_what_no_stage_used():
    # two GPUs for 100 s; encode 0.25 GPU for 80 s, generate 0.75 for 120 s (two actors); 10 s of start-up
    shares = attribute({"encode": 80, "generate": 120, "read": 50}, {"encode": 0.25, "generate": 0.75}, 200, 0.1)
    assert shares.stages == {"encode": pytest.approx(0.1), "generate": pytest.approx(0.45)}
    assert shares.idle == pytest.approx(0.45)
    parts = shares.dollars(8.0)
    assert parts == {
        "usd/encode": pytest.approx(0.8),
        "usd/generate": pytest.approx(3.6),
        "usd/startup": pytest.approx(0.8),
        "usd/idle": pytest.approx(2.8),
    }
    assert sum(parts.values()) == pytest.approx(8.0)


def test_work_beyond_the_capacity_leaves_no_idle_and_no_negative_money():
    parts = attribute({"encode": 90, "generate": 60}, {"encode": 1, "generate": 1}, 100, 0.2).dollars(3.0)
    assert parts["usd/idle"] == parts["usd/startup"] == 0
    assert sum(parts.values()) == pytest.approx(3.0)


def test_nothing_held_is_no_division_by_zero():
    assert attribute({}, {}, 0, 0) == Attribution()
    assert price_run(0.5, 0, 0) == {"usd_total": 0.5}, "nothing was captioned: no price of an image"


def test_steady_dollars_are_those_of_a_rate_and_of_its_interval():
    rates = {"images_per_second": 10.0, "images_per_second_low": 8.0, "images_per_second_high": 12.5}
    assert price_steady(1.5, 2700, rates) == {
        "usd_per_hour": pytest.approx(2.0),
        "usd_per_million_images_steady": pytest.approx(2.0 / 36_000 * 1e6),
        "usd_per_million_images_steady_low": pytest.approx(2.0 / 45_000 * 1e6),
        "usd_per_million_images_steady_high": pytest.approx(2.0 / 28_800 * 1e6),
    }
    assert price_steady(1.5, 2700, {"images_per_second": 0.0}) == {}
    assert price_steady(0.0, 0.0, rates) == {}


def test_a_run_that_is_over_is_priced_again_by_one_price_of_its_cluster():
    """200 s, 50 of them start-up, at 36 dollars an hour: a cent a second. Rates and counts stay, old dollars go."""
    kept = {"wall_seconds": 200.0, "startup_seconds": 50.0, "images_captioned": 1000, "images_per_second": 10.0}
    kept |= {"mean_caption_tokens": 12.0}
    old = {"usd_total": 7.0, "usd/idle": 1.0, "tokens_per_usd": 5.0, "usd_of_output": 8.0}
    assert price_again(kept | old, 36.0) == pytest.approx(
        kept
        | {
            "usd_total": 2.0,
            "usd_per_image": 0.002,
            "usd_per_million_images": 2000.0,
            "tokens_per_usd": 6000.0,
            "usd/startup": 0.5,
            "usd_per_hour": 36.0,
            "usd_per_million_images_steady": 1000.0,
        }
    )


def test_dollars_up_to_a_moment_are_those_of_the_nodes_that_were_there(clock):
    held = meter(clock)
    held.poll([node("1", "a")])  # 3.6 an hour
    clock.now += 100
    held.poll([node("1", "a"), node("2", "a")])
    clock.now += 100
    held.poll([node("1", "a")])
    clock.now += 100
    began = held.started
    assert [held.usd_until(began + s) for s in (50, 150, 300)] == [pytest.approx(s / 1000) for s in (50, 200, 400)]
    assert held.usd == pytest.approx(0.4)


def test_what_an_hour_costs_is_not_known_while_a_node_has_no_price(clock):
    held = meter(clock)
    held.poll([node("1", "a"), node("2", CPU=4)])
    assert held.usd_per_hour is None
    held.poll([node("1", "a")])
    assert held.usd_per_hour == pytest.approx(3.6)


def test_prices_of_a_run_and_of_a_rate():
    assert price_run(2.0, 1000, 50_000) == {
        "usd_total": 2.0,
        "usd_per_image": 0.002,
        "usd_per_million_images": 2000.0,
        "tokens_per_usd": 25_000,
    }
    # the published 9.33 images/s of an A100 at p4d's price of a GPU: about 82 dollars a million
    assert usd_per_million_images(21.957642 / 8, 9.33) == pytest.approx(81.7, abs=0.1)


def test_the_runs_of_an_output_add_up_also_those_that_were_killed(tmp_path):
    store = Store(str(tmp_path))
    assert read_spent(store) == Spent()
    first, second = new_run(), new_run()
    assert first != second
    record_run(store, first, 1.0, 60.0, {"a": 60.0})
    record_run(store, first, 2.0, 120.0, {"a": 120.0})  # in place of the first beat
    record_run(store, second, None, 30.0, {"a": 10.0, "unknown node": 30.0})
    spent = read_spent(store)
    assert (spent.runs, spent.unpriced, spent.usd, spent.wall_seconds) == (2, 1, 2.0, 150.0)
    assert spent.node_seconds == {"a": 130.0, "unknown node": 30.0}


def test_a_damaged_record_is_left_out_with_a_warning(tmp_path, caplog):
    store = Store(str(tmp_path))
    record_run(store, "good", 1.0, 60.0, {})
    store.write("runs/bad.json", b"{")
    assert read_spent(store).usd == 1.0
    assert "bad.json" in caplog.text
