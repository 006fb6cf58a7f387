"""The estimate: its arithmetic against runs whose truth is known, its sample, and that it writes nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.caption_corpus import main
from pipelines.config.keys import Config
from pipelines.config.load import load_config
from pipelines.preflight.estimate import run_estimate
from pipelines.preflight.extrapolate import UNSEEN_DRIFT, MeasuredSample, pace, scale, spread
from pipelines.preflight.sample import draw_units
from pipelines.run.job import Actors, prepare
from tests.helpers import LOCAL, QUICK, fake_encoder, fake_generator, run_fake


def measured(num_units: int = 12, *, noise: float = 0.0, seed: int = 0, **more) -> MeasuredSample:
    """Units of 32 images, of which 30 are captioned, at 10 images/s after 20 s of start-up and 5 s of shutting down."""
    rng = np.random.default_rng(seed)
    work = 3.2 * np.exp(rng.normal(0, noise, num_units))
    arrivals = 20 + np.cumsum(work)
    ones = np.ones(num_units)
    fields = {
        "arrivals": arrivals,
        "rows": 32 * ones,
        "captioned": 30 * ones,
        "output_bytes": 4000 + 30 * 100 * ones,
        "object_bytes": 4000.0,
        "seconds": {"read": 0.1 * work, "decode": 0.2 * work, "encode": 0.5 * work, "generate": 0.98 * work},
        "parallel": {"read": 2.0, "decode": 2.0, "encode": 1.0, "generate": 1.0},
        "elapsed": float(arrivals[-1] + 5),
    }
    return MeasuredSample(**fields | more)


def test_the_time_is_what_is_fixed_plus_what_each_image_takes():
    estimate = scale(measured(), 3200, 25, 3.6, [], seed=0)
    assert estimate.seconds_per_image == pytest.approx(0.1)
    assert estimate.fixed_seconds == pytest.approx(25.0)  # start-up and shutting down
    assert estimate.here.seconds.value == pytest.approx(345.0)
    assert estimate.here.usd
    assert estimate.here.usd.value == pytest.approx(0.345)
    assert estimate.images.value == pytest.approx(3000)
    assert estimate.output_bytes.value == pytest.approx(25 * 4000 + 3000 * 100)


def test_nine_of_ten_runs_fall_into_the_interval_when_units_differ():
    """The truth: 400 more units of the same kind, one after another."""
    hits = 0
    for seed in range(100):
        estimate = scale(measured(20, noise=0.3, seed=seed), 32 * 400, 400, 3.6, [], seed=0)
        rng = np.random.default_rng(10_000 + seed)
        truth = 25 + 3.2 * np.exp(rng.normal(0, 0.3, 400)).sum()
        hits += estimate.here.seconds.low <= truth <= estimate.here.seconds.high
    assert hits >= 85


def test_a_machine_that_drifts_has_a_wider_interval():
    calm = measured()
    slower = np.concatenate([np.full(6, 3.2), np.full(6, 6.4)])
    drifting = measured(arrivals=20 + np.cumsum(slower))
    assert spread(calm) == pytest.approx(0.0, abs=1e-9)
    assert spread(drifting) > 0.2

    def width(sample: MeasuredSample) -> float:
        seconds = scale(sample, 32_000, 250, None, [], seed=0).here.seconds
        return (seconds.high - seconds.low) / seconds.value

    assert 0.1 < width(calm) < 0.25  # at least DRIFT
    assert width(drifting) > 2 * width(calm)


def test_the_fixed_seconds_were_measured_once_and_have_a_spread_of_their_own():
    """Nearly all of the time is fixed, so the interval is that of a log-normal of FIXED_SPREAD."""
    sample = measured(elapsed=100_000.0)
    seconds = scale(sample, 32, 1, None, [], seed=0).here.seconds
    assert seconds.high / seconds.low == pytest.approx(np.exp(2 * 1.645 * 0.15), rel=0.05)


def test_images_that_were_decoded_while_the_models_loaded_do_not_flatter():
    sample = measured(seconds={**measured().seconds, "decode": np.full(12, 20.0), "read": np.full(12, 0.0)})
    assert pace(sample)[0] == pytest.approx(20 / 2 / 32)


def test_a_sample_of_one_unit_takes_its_slowest_stage():
    assert pace(measured(1)) == (pytest.approx(0.98 * 3.2 / 32), 0.0)


def test_units_that_pile_up_before_the_last_stage_do_not_flatter_and_widen_the_interval():
    """All twelve are there within a second: they waited for the last stage to start."""
    seconds = measured().seconds | {"read": np.zeros(12), "decode": np.zeros(12)}
    sample = measured(arrivals=30 + np.linspace(0, 1, 12), elapsed=32.0, seconds=seconds)
    per_image, left_open = pace(sample)
    arrived, busy = 1 / (11 * 32), 0.98 * 3.2 / 32
    assert per_image == pytest.approx(arrived ** (1 / 3) * busy ** (2 / 3))
    assert per_image * np.exp(-1.645 * left_open) == pytest.approx(arrived)
    assert per_image * np.exp(1.645 * left_open) > busy
    time = scale(sample, 3200, 25, None, [], seed=0).here.seconds
    assert time.high > 32 + 0.8 * 3200 * busy
    assert pace(measured())[1] == 0.0


def test_a_short_sample_says_nothing_about_drift():
    assert spread(measured(6)) == UNSEEN_DRIFT


def test_bad_rows_may_all_have_been_missed_where_few_units_were_seen():
    """None of six units lost an image: of what was not sampled up to three tenths may be lost, and of a sample that is
    nearly everything hardly any."""
    sample = measured(6, captioned=32 * np.ones(6))
    some = scale(sample, 3200, 25, None, [], seed=0).images
    assert some.value == pytest.approx(3200)
    assert 0.6 * 3200 < some.low < 0.9 * 3200
    assert some.high == some.value, "a corpus without bad rows lies inside"
    seen = scale(measured(6, captioned=np.array([32, 32, 0, 32, 0, 32])), 3200, 25, None, [], seed=0).images
    assert seen.low < seen.value < seen.high, "failures that were seen are in the differences between units"
    nearly = scale(sample, 200, 7, None, [], seed=0).images
    assert nearly.low > 0.95 * 200


def test_an_instance_of_given_speed_is_scaled_but_for_what_is_fixed_and_one_without_is_marked():
    instances = [("fast", 36.0, 4.0), ("unknown", 1.8, None)]
    fast, unknown = scale(measured(), 3200, 25, 3.6, instances, seed=0).instances
    assert fast.seconds.value == pytest.approx(25 + 320 / 4)
    assert fast.usd
    assert fast.usd.value == pytest.approx(105 * 36 / 3600)
    assert unknown.speed is None
    assert unknown.usd
    assert unknown.usd.value == pytest.approx(345 * 1.8 / 3600)


def test_without_a_price_there_is_time_and_no_dollars():
    estimate = scale(measured(), 3200, 25, None, [], seed=0)
    assert estimate.here.usd is None
    assert "estimate/usd" not in estimate.metrics()
    assert estimate.metrics()["estimate/seconds"] == pytest.approx(345.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, scene_parquet: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    scene_parquet(folder / "a.parquet", 24, row_group_size=4)
    scene_parquet(folder / "b.parquet", 8, row_group_size=4, start=24)
    return folder


SMALL = ("unit.images=4", "encode.batch_size=2", "generate.batch_size=2", "estimate.images=16")


def test_the_sample_is_drawn_over_the_whole_corpus_without_doubles(corpus: Path, tmp_path: Path):
    job = prepare(load_config([*QUICK, *SMALL, f"input.path={corpus}", f"output.path={tmp_path}", "run.estimate=true"]))
    for seed in range(10):
        spans = draw_units(job, 16, seed)
        units = [span.units[0] for span in spans]
        assert len({unit.name for unit in units}) == len(units) == 8  # of 2 images, as a batch
        assert sum(unit.sources == ("b.parquet",) for unit in units) == 2, (
            "a quarter of the rows, a quarter of the sample"
        )
    assert draw_units(job, 16, 0) != draw_units(job, 16, 1)


def test_the_estimate_writes_nothing_and_counts_what_is_left(corpus: Path, tmp_path: Path):
    output = tmp_path / "out"
    arguments = [*SMALL, f"input.path={corpus}", f"output.path={output}"]

    fakes = Actors(fake_encoder(seconds=0.05), fake_generator())

    def estimate():
        job = prepare(load_config([*QUICK, LOCAL, *arguments, "run.estimate=true", "cost.usd_per_hour=3.6"]), fakes)
        return run_estimate(job)[0]

    found = estimate()
    assert not output.exists()
    assert found.rows == 32
    assert found.images.value == 32
    assert found.sample_images == 16
    assert found.here.usd
    assert found.here.usd.value == pytest.approx(found.here.seconds.value * 3.6 / 3600)
    assert run_fake(*arguments, "input.limit=8").code == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    written = sum(path.stat().st_size for path in (output / "captions").iterdir())
    found = estimate()
    assert found.rows == 24
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert found.output_bytes.value == pytest.approx(3 * written, rel=0.1)


def test_nodes_that_join_during_the_sample_are_priced(corpus: Path, tmp_path: Path, monkeypatch, caplog):
    labels = {"1": "m7i.xlarge", "2": "g6e.2xlarge"}
    nodes = [{"NodeID": n, "Alive": True, "Labels": {"instance-type": i}, "Resources": {}} for n, i in labels.items()]
    seen = []

    def growing(config: Config) -> list[dict]:
        seen.append(1)
        return nodes[: len(seen)]

    monkeypatch.setattr("pipelines.preflight.estimate.cluster_nodes", growing)
    arguments = [*QUICK, LOCAL, *SMALL, f"input.path={corpus}", f"output.path={tmp_path}", "cost.usd_per_hour=null"]
    job = prepare(load_config([*arguments, "run.estimate=true"]), Actors(fake_encoder(), fake_generator()))
    found = run_estimate(job)[0]
    assert found.here.usd_per_hour == pytest.approx(0.2016 + 2.24208)
    assert f"in the end {os.cpu_count()} CPUs" in found.cluster
    assert "1 nodes joined during the sample" in caplog.text


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("x9.huge", "no price file knows the instance x9.huge"),
        ("g6.xlarge:fast", "must be NAME or NAME:SPEED with a speed above 0, got 'g6.xlarge:fast'"),
        ("g6.xlarge:-1", "with a speed above 0"),
    ],
)
def test_an_instance_that_cannot_be_priced_is_refused_before_anything_starts(corpus, tmp_path, capsys, entry, problem):
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", f"estimate.instances=['{entry}']"]
    assert main([*QUICK, *arguments, "run.estimate=true"]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
