"""The advice: what it recommends, and what it warns of, for results made up to have one answer."""

from typing import Any

import pytest

from pipelines.run.outcome import Cluster
from pipelines.sweep.advice import Advice, advise
from pipelines.sweep.setting import settings_of


def record(method: str, retention: float, cost, quality, cluster: str = "e1g1", **more: Any) -> dict[str, Any]:
    """A finished point with (value, low, high) of dollars and of quality."""
    name = "usd_per_million_images_steady"
    values = {"method": method, "retention": retention, "cluster": cluster}
    costs = {name: cost[0], f"{name}_low": cost[1], f"{name}_high": cost[2]} if cost else {}
    measured = {"relative": quality, "relative_by": "CIDEr against the references", "referenced": 1000}
    return {
        "name": f"{method}-{retention}-{cluster}",
        "status": "finished",
        "reason": "",
        "values": values,
        "metrics": {"images_per_second": 100 / cost[0] if cost else 10.0, **costs},
        "quality": measured,
        **more,
    }


def around(value: float, share: float = 0.02) -> list[float]:
    return [value, value * (1 - share), value * (1 + share)]


UNPRUNED = record("none", 1.0, around(100), [1, 1, 1])
RECORDS = [
    UNPRUNED,
    record("otprune", 0.05, around(20), [0.80, 0.75, 0.85]),
    record("otprune", 0.1, around(30), [0.97, 0.955, 0.99]),
    record("otprune", 0.2, around(50), [0.99, 0.98, 1.0]),
    record("random", 0.1, around(30), [0.70, 0.65, 0.75]),
    record("uniform", 0.1, around(30), [0.75, 0.70, 0.80]),
]


def advice(records, difference=lambda ours, theirs: (0.2, 0.1, 0.3), tolerance: float = 0.05) -> Advice:
    return advise(records, tolerance=tolerance, difference=difference)


def test_it_buys_the_cheapest_setting_that_surely_keeps_the_quality():
    found = advice(RECORDS)
    assert found.buy is not None
    assert found.buy.label == "otprune at 10 %"
    assert found.headline == "Buy otprune at 10 % of the visual tokens (e1g1)"
    assert "97 % (96 to 99)" in found.reasons[0]
    assert "70 % less than the unpruned" in found.reasons[1]
    assert found.warnings == []


def test_a_stricter_tolerance_buys_more_tokens():
    buy = advice(RECORDS, tolerance=0.03).buy
    assert buy is not None
    assert buy.label == "otprune at 20 %"


def test_without_a_setting_that_is_sure_it_buys_the_unpruned_model_and_names_the_best():
    found = advice([UNPRUNED, RECORDS[1], RECORDS[4]])
    assert found.buy is not None
    assert found.buy.is_unpruned
    assert "the best is otprune at 5 % (e1g1) with 80 % (75 to 85)" in found.reasons[0]


def test_where_random_tokens_do_as_well_random_is_bought():
    records = [UNPRUNED, RECORDS[2], record("random", 0.1, around(25), [0.98, 0.96, 1.0])]
    buy = advice(records).buy
    assert buy is not None
    assert buy.label == "random at 10 %"


def test_it_says_when_a_method_is_not_shown_to_beat_random():
    found = advice(RECORDS, difference=lambda ours, theirs: (0.01, -0.02, 0.04))
    assert [warning.split(":")[0] for warning in found.warnings] == [
        "It is not shown to be better than random tokens at the same retention",
        "It is not shown to be better than uniform tokens at the same retention",
    ]


def test_it_says_when_the_baselines_are_missing():
    warnings = advice([UNPRUNED, RECORDS[2]]).warnings
    assert sum("was not run at this retention" in warning for warning in warnings) == 2


def test_it_says_when_intervals_of_cost_overlap():
    records = [record("none", 1.0, around(33, 0.2), [1, 1, 1]), *RECORDS[2:]]
    records.append(record("otprune", 0.15, around(30.5), [0.985, 0.97, 1.0]))
    warnings = " ".join(advice(records).warnings)
    assert "overlaps that of the unpruned model: a saving is not shown" in warnings
    assert "cannot be told from that of 2 settings of higher quality, such as unpruned (e1g1)" in warnings


def test_it_says_when_quality_is_agreement_or_of_few_images_or_cut():
    poor = record("otprune", 0.1, around(30), [0.97, 0.96, 0.99])
    poor["quality"] |= {"relative_by": "ROUGE-L against unpruned captions", "referenced": 0, "captions": 20}
    poor["metrics"]["finished_by_length"] = 0.5
    warnings = " ".join(advice([UNPRUNED, poor, *RECORDS[4:]]).warnings)
    assert "agreement with unpruned captions, not accuracy" in warnings
    assert "Quality is that of 20 images" in warnings
    assert "50 % of its captions are cut" in warnings


def test_it_says_when_fewer_tokens_seem_to_cost_more():
    settled = advice(RECORDS).warnings
    noisy = advice([*RECORDS, record("random", 0.05, around(40), [0.5, 0.4, 0.6])]).warnings
    assert settled == []
    assert "in 1 of 4 pairs of retentions the one with fewer tokens seems to cost more" in noisy[0]


def test_failed_points_are_named_and_do_not_count():
    failed = {"name": "otprune-0.1-x", "status": "failed", "reason": "out of memory", "values": {}}
    found = advice([*RECORDS, failed])
    assert found.warnings == [
        "1 points failed and are not in this advice; reason of the first (otprune-0.1-x): out of memory"
    ]


def test_without_an_unpruned_point_there_is_no_advice():
    found = advice(RECORDS[1:])
    assert found.buy is None
    assert "no unpruned point has finished" in found.headline


def test_the_saving_is_against_the_unpruned_model_on_the_same_machines():
    other = record("none", 1.0, around(1000), [1, 1, 1], cluster="slow")
    assert "70 % less" in advice([other, *RECORDS]).reasons[1]


def test_other_prices_and_other_machines_are_no_fair_comparison():
    stale = advice([UNPRUNED, RECORDS[2] | {"stale_price": True}, *RECORDS[3:]])
    assert stale.buy is not None
    assert stale.buy.cost[0] < 100, "in hours, not in dollars of two tariffs"
    assert any("1 points were priced by other prices" in text for text in stale.warnings)
    small, large = (Cluster("embedded", cpus, 0, f"http://{cpus}") for cpus in (2, 64))
    where = [record | {"ran_on": small.to_dict() | {"dashboard": f"http://{i}"}} for i, record in enumerate(RECORDS)]
    assert advice(where).warnings == [], "dashboards differ, machines do not"
    where[2]["ran_on"] = large.to_dict()
    both = "embedded Ray: 2 CPUs, 0 GPUs and on embedded Ray: 64 CPUs, 0 GPUs"
    assert f"Points of e1g1 ran on {both}" in advice(where).warnings[0]
    where = [record | {"ran_on": "embedded Ray: 2 CPUs"} for record in RECORDS]
    assert advice(where).warnings == [], "records may hold a text"


def test_without_prices_settings_compare_by_hours():
    records = [record("none", 1.0, None, [1, 1, 1]), record("otprune", 0.1, None, [0.97, 0.96, 0.99])]
    records[1]["metrics"]["images_per_second"] = 20.0
    first, second = settings_of(records)
    assert (first.label, second.label) == ("otprune at 10 %", "unpruned")
    assert first.cost[0] == pytest.approx(1e6 / 20 / 3600)
