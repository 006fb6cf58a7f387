"""All metrics of a run: two nodes with prices, a gate in the middle, an earlier run. The test sets the clock.

second   0    5        10    20       40     50     60  70  80     90       100
         run  node a   gate  node b   gate   first  units           node b   end
                       begins joins   ends   work    come           leaves
"""

import math

import pytest

from pipelines.config.load import load_config
from pipelines.dollars.account import Account
from pipelines.dollars.cap import check_prices, over_budget
from pipelines.dollars.ledger import Spent
from pipelines.dollars.meter import Meter, Tariff
from pipelines.dollars.prices import Price
from pipelines.errors import UserError
from pipelines.run.job import prepare
from pipelines.run.metrics import run_metrics
from pipelines.run.pool_clock import PoolClock
from pipelines.run.progress import Progress
from pipelines.run.resources import stage_weights
from tests.helpers import LOCAL, QUICK, write_corpus

A, B = Price("a", 3.6), Price("b", 7.2)  # 0.001 and 0.002 dollars a second
T_975 = 4.302653  # Student's t of 2 degrees of freedom
START = 1000.0


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def node(name: str, gpus: float) -> dict:
    return {"NodeID": name, "Alive": True, "Labels": {"instance-type": name}, "Resources": {"CPU": 4.0, "GPU": gpus}}


def unit(captioned: int, encode: float, generate: float, quarantined: int = 0) -> dict:
    return {
        "images_captioned": captioned,
        "images_quarantined": quarantined,
        "captions": captioned,
        "unanswered": 0,
        "prompt_tokens": 30 * captioned,
        "generated_tokens": 10 * captioned,
        "finished_by_length": captioned // 4,
        "finished_by_loop": captioned // 10,
        "retried": captioned // 6,
        "repaired": captioned // 9,
        "retry_tokens": 5 * captioned,
        "reasons": {"empty": quarantined} if quarantined else {},
        "seconds": {"read": 3.0, "encode": encode, "generate": generate},
    }


@pytest.fixture
def job(tmp_path, scene_png):
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(0)] * 2)
    return prepare(load_config([*QUICK, f"input.path={corpus}", f"output.path={tmp_path / 'out'}"]))


def lived(clock: Clock) -> tuple[Progress, Account, PoolClock]:
    """The run of the picture above."""
    meter = Meter(Tariff((A, B)), clock.now, clock)
    earlier = Spent()
    earlier.add(3.0, 500.0, {"a": 500.0})
    account = Account(meter, earlier, "GPU", {"encode": 0.25, "generate": 0.75})
    progress = Progress(120, 10, meter, 5.0)
    clock.now = START + 5
    meter.poll([node("a", 1)])
    clock.now = START + 20
    meter.poll([node("a", 1), node("b", 2)])
    account.gate = (START + 10, START + 40)
    pools = PoolClock()
    pools.count("encode", held=60.0, active=30.0)
    pools.count("generate", held=50.0, active=25.0)  # two units overlap in the generator
    for second, each in ((60, unit(18, 4.0, 6.0, 2)), (70, unit(30, 8.0, 16.0)), (80, unit(40, 8.0, 18.0))):
        clock.now = START + second
        progress.update(each)
    clock.now = START + 90
    meter.poll([node("a", 1)])
    clock.now = START + 100
    meter.stop()
    return progress, account, pools


def test_all_metrics_of_a_run_with_a_gate_two_nodes_and_an_earlier_run(clock, job):
    progress, account, pools = lived(clock)
    # 90 images (88 captioned) in the 30 s since the first work: gaps of 10 s with 20, 30 and 40 of them.
    rate, reach = 3.0, math.exp(T_975 * (math.sqrt(3 / 2 * (10**2 + 0 + 10**2)) / 30) / 3.0)
    usd = 100 * 0.001 + 70 * 0.002
    until_first, gate = 50 * 0.001 + 30 * 0.002, 30 * 0.001 + 20 * 0.002
    per_hour = 3600 * (usd - until_first) / 50  # neither start-up nor gate, in dollars and in seconds
    metrics = run_metrics(job, progress, account, pools)
    flops = metrics.pop("prefill_tflops_per_image")
    assert flops > 0
    assert metrics == pytest.approx(
        {
            "images_per_second": rate,
            "images_per_second_low": rate / reach,
            "images_per_second_high": rate * reach,
            "tokens_per_second": 880 / 30,
            "images_captioned": 88,
            "images_quarantined": 2,
            "mean_caption_tokens": 10.0,
            "mean_prompt_tokens": 30.0,
            "finished_by_length": (4 + 7 + 10) / 88,
            "finished_by_loop": (1 + 3 + 4) / 88,
            "captions_retried": 3 + 5 + 6,
            "captions_repaired": 2 + 3 + 4,
            "retry_tokens": 440,
            "wall_seconds": 100.0,
            "startup_seconds": 50.0 - 30.0,
            "seconds/read": 9.0,
            "seconds/encode": 20.0,
            "seconds/generate": 40.0,
            "gpu_busy/encode": 20 / 60,
            "gpu_busy/generate": 25 / 50,
            "quarantined/empty": 2,
            "node_hours": (100 + 70) / 3600,
            "idle_share": 1 - (20 * 0.25 + 40 * 0.75) / 240 - gate / usd,
            "usd_total": usd,
            "usd_of_output": usd + 3.0,
            "usd_per_image": usd / 88,
            "usd_per_million_images": 1e6 * usd / 88,
            "tokens_per_usd": 880 / usd,
            "usd/encode": usd * 5 / 240,
            "usd/generate": usd * 30 / 240,
            "usd_of_retries": usd * 30 / 240 / 3,  # half a token was thrown away for each that was kept
            "usd/gate": gate,
            "usd/startup": until_first - gate,
            "usd/idle": usd * (1 - 35 / 240) - until_first,
            "usd_per_hour": per_hour,
            "usd_per_million_images_steady": 1e6 * per_hour / (3600 * rate),
            "usd_per_million_images_steady_low": 1e6 * per_hour / (3600 * rate * reach),
            "usd_per_million_images_steady_high": 1e6 * per_hour / (3600 * rate / reach),
            "usd_to_finish": (120 - 10 - 90) / rate * 3.6 / 3600,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(
    ("arguments", "resource", "weights"),
    [
        ((), "CPU", {"read": 1.0, "decode": 1.0, "encode": 0.5, "generate": 2, "write": 0.25}),
        (("encode.num_gpus=0.25",), "GPU", {"encode": 0.25, "generate": 0.0}),
        (("encode.num_gpus=0.25", "generate.num_gpus=0.7"), "GPU", {"encode": 0.25, "generate": 0.7}),
    ],
)
def test_dollars_are_divided_by_gpus_if_any_actor_holds_some_and_else_by_cpus(arguments, resource, weights):
    pools = (LOCAL, "encode.num_cpus=0.5", "generate.num_cpus=2", "generate.num_gpus=0")
    assert stage_weights(load_config([*QUICK, *pools, *arguments]), None) == (resource, weights)


def test_a_node_that_joins_without_a_price_ends_a_capped_run(clock):
    meter = Meter(Tariff((A, B)), clock.now, clock)
    account = Account(meter, Spent())
    meter.poll([node("a", 1)])
    clock.now += 10
    assert over_budget(100.0, account.usd_of_output, account) == ""
    meter.poll([node("a", 1), node("unheard of", 1)])
    assert "budget.max_usd=100 cannot be kept: 1 node: unheard of" in over_budget(100.0, account.usd_of_output, account)
    assert over_budget(None, account.usd_of_output, account) == ""
    with pytest.raises(UserError, match="needs the price of every node: 1 node: unheard of"):
        check_prices(100.0, account)


def test_an_actor_is_never_busier_than_it_was_held(clock, job):
    progress, account, pools = lived(clock)
    pools.count("generate", held=0.0, active=500.0)
    progress.totals.seconds["generate"] = 400.0
    assert run_metrics(job, progress, account, pools)["gpu_busy/generate"] == 1.0
