"""Sweeps from grid to record on an embedded Ray, with stages that need no model: what fails, and what survives it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from pipelines.config.keys import PruneConfig
from pipelines.config.load import load_config
from pipelines.dollars.ledger import record_run
from pipelines.errors import UserError
from pipelines.report.write import report_captions
from pipelines.run.job import Actors, prepare
from pipelines.run.run import run_job
from pipelines.stages.ragged import Ragged
from pipelines.stages.unit_batch import Answer, UnitBatch
from pipelines.store import Store
from pipelines.sweep import submit as sweep_submit
from pipelines.sweep import tracker as sweep_track
from pipelines.sweep.checked import prepare_sweep
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.dry_run import Trial, estimate_points, seconds_per_image
from pipelines.sweep.run import SweepOutcome, run_sweep
from tests.helpers import DEMO, LOCAL, REPOSITORY, addresses, free_port, write_corpus

GRID = "{method: [none, otprune], retention: [0.25, 0.5]}"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def shortening_encoder() -> type:
    """Its tokens say how many words of the caption are left."""

    class Shortening:
        def __init__(self, *, prune: PruneConfig, **_: object) -> None:
            self.words = 8 if prune.method == "none" else round(8 * prune.share)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            for image in unit_batch.images:
                image.num_visual_tokens = 8
            rows = [np.zeros((self.words, 1), np.float32) for _ in unit_batch.images]
            unit_batch.arrays = {"tokens": Ragged.of(rows, np.zeros((0, 1), np.float32))}
            return unit_batch.to_row()

    return Shortening


def wording_generator() -> type:
    """Captions of as many words as the image has tokens left, the last of them the image's own."""
    words = WORDS

    class Wording:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            for image, k in zip(unit_batch.images, unit_batch.arrays["tokens"].lengths.tolist(), strict=True):
                text = " ".join([image.sha256[:8], *words][:k])
                image.answers = [Answer(text, k, k, k, "stop") for _ in image.prompts]
            unit_batch.arrays = {}
            return unit_batch.to_row()

    return Wording


def fakes() -> Actors:
    return Actors(shortening_encoder(), wording_generator())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, scene_png) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "a.parquet", [scene_png(i % 6) for i in range(8)], rows_per_group=2)
    return folder


@pytest.fixture
def sweep_of(corpus, tmp_path):
    """The outcome of a sweep of eight images; the same call again resumes it."""

    def run(grid: str = GRID, *more: str) -> SweepOutcome:
        settings = [*DEMO, LOCAL, "unit.images=2", "run.samples=2", "mlflow.enabled=false", "cost.usd_per_hour=3.6"]
        settings.append("sweep.baselines=false")
        paths = [f"input.path={corpus}", f"output.path={tmp_path / 'sweep'}"]
        config = load_config([*settings, *paths, f"sweep.grid={grid}", *more], SweepConfig)
        return run_sweep(prepare_sweep(config, fakes()))

    return run


def test_points_are_measured_skipped_when_finished_and_reported(sweep_of, tmp_path, corpus):
    first = sweep_of()
    assert (first.code, first.skipped, len(first.records)) == (0, 0, 3)
    relative = {
        r["values"]["method"] + f"{r['values']['retention']:g}": r["quality"]["relative"]
        for r in first.records.values()
    }
    assert list(relative["none1"]) == [1, 1, 1]
    assert relative["otprune0.25"][0] < relative["otprune0.5"][0] < 1
    for record in first.records.values():
        metrics = record["metrics"]
        assert metrics["images_captioned"] == 8
        assert metrics["usd_per_million_images_steady"] == pytest.approx(1000 / metrics["images_per_second"], rel=0.05)
        assert addresses(tmp_path / "sweep" / "points" / record["name"]) == [("a.parquet", row) for row in range(8)]
    assert first.advice is not None
    assert first.advice.headline == "Buy the unpruned model (e1g1)"
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "points").rglob("*.*")}
    again = sweep_of()
    assert (again.code, again.skipped, again.message) == (0, 3, "nothing to do: every point is finished")
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "points").rglob("*.*")}
    estimates = {e.point.name: e for e in estimate_points(_prepared(tmp_path, corpus))}
    done = [each for each in estimates.values() if each.finished]
    assert (len(done), sum(each.usd or 0 for each in done)) == (3, 0)
    left = [each for each in estimates.values() if not each.finished]
    assert [each.point.config.prune.retention for each in left] == [0.75]
    assert all(each.images == 8 and each.usd and each.seconds for each in left)
    assert not list((tmp_path / "sweep").glob("trial-*")), "the trials leave nothing behind"


def test_points_that_finished_before_the_unpruned_one_are_held_against_it_once_it_is_there(sweep_of):
    first = sweep_of("{method: [otprune], retention: [0.5]}")
    assert [record["quality"]["relative"] for record in first.records.values()] == [None]
    grid = "{method: [none, otprune], retention: [0.5]}"
    second = sweep_of(grid)
    assert (second.code, second.skipped) == (0, 1)
    (pruned,) = (r for r in second.records.values() if r["values"]["method"] == "otprune")
    assert pruned["quality"]["relative"][0] < 1
    assert second.advice is not None
    assert "the best is otprune at 50 %" in second.advice.reasons[0]
    third = sweep_of(grid, "sweep.resamples=50")
    assert third.skipped == 2
    assert all(r["quality"]["judged"]["resamples"] == 50 for r in third.records.values())


def test_finished_points_are_priced_by_the_prices_of_now(sweep_of):
    grid = "{method: [none]}"
    (cheap,) = sweep_of(grid).records.values()
    (dear,) = sweep_of(grid, "cost.usd_per_hour=36").records.values()
    assert dear["metrics"]["images_per_second"] == cheap["metrics"]["images_per_second"]  # it did not run again
    for name in ("usd_total", "usd_per_million_images", "usd_per_million_images_steady", "usd/startup", "usd_per_hour"):
        assert dear["metrics"][name] == pytest.approx(10 * cheap["metrics"][name], rel=0.02), name
    by_node = sweep_of(grid, "cost.usd_per_hour=null")
    assert by_node.advice is not None
    assert any("1 points were priced by other prices" in text for text in by_node.advice.warnings)


def test_the_cap_counts_points_of_earlier_grids_too(sweep_of, tmp_path):
    record_run(Store(str(tmp_path / "sweep" / "points" / "forgotten")), "20260101T000000-old", 7.0, 10.0, {})
    outcome = sweep_of("{method: [none]}", "budget.max_usd=5")
    assert outcome.code == 4
    assert "$7.0000 spent" in outcome.message


def _prepared(tmp_path: Path, corpus: Path):
    grid = "sweep.grid={method: [none, otprune], retention: [0.25, 0.5, 0.75]}"
    settings = [*DEMO, LOCAL, "unit.images=2", "run.samples=2", "mlflow.enabled=false", "cost.usd_per_hour=3.6", grid]
    paths = [
        f"input.path={corpus}",
        f"output.path={tmp_path / 'sweep'}",
        "sweep.trial_images=6",
        "sweep.baselines=false",
    ]
    return prepare_sweep(load_config([*settings, *paths], SweepConfig), fakes())


def test_seconds_an_image_grow_with_the_tokens_and_never_fall():
    few, many = Trial(0.05, 0.1, 5.0, 1.0), Trial(0.45, 0.5, 5.0, 1.0)
    assert seconds_per_image(0.25, [few, many]) == pytest.approx(0.3)
    noisy = [Trial(0.05, 0.5, 5.0, 1.0), Trial(0.45, 0.3, 5.0, 1.0)]
    assert {seconds_per_image(retention, noisy) for retention in (0.05, 0.25, 0.45)} == {0.4}
    assert seconds_per_image(0.1, [few]) == 0.1


@pytest.mark.slow
def test_a_point_that_fails_and_a_cluster_out_of_reach_cost_only_themselves(sweep_of, tmp_path, ray_session):
    nobody = f"http://127.0.0.1:{free_port()}"
    huge, rare = "{name: huge, encode.actors: 99}", "{name: rare, generate.accelerator: B200}"
    clusters = f"[{{name: here}}, {huge}, {rare}, {{name: away, address: '{nobody}'}}]"
    grid = f"{{method: [none], cluster: {clusters}}}"
    outcome = sweep_of(grid, "ray.address=null")
    assert outcome.code == 1
    found = {record["values"]["cluster"]: record for record in outcome.records.values()}
    assert found["here"]["status"] == "finished"
    assert "need 101 CPUs, the cluster has" in found["huge"]["reason"]
    assert "generate.accelerator must be one of the cluster's (none), got B200" in found["rare"]["reason"]
    assert f"no Ray dashboard answers at {nobody}" in found["away"]["reason"]
    assert "3 of 4 points failed" in outcome.message
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "need 101 CPUs" in page
    again = sweep_of(grid, "ray.address=null")  # what failed is tried again
    assert (again.skipped, again.code, len(again.records)) == (1, 1, 4)


def test_the_cap_stops_the_sweep_and_a_higher_one_goes_on(sweep_of):
    capped = sweep_of("{method: [none]}", "budget.max_usd=0.0000001")
    assert (capped.code, capped.records) == (4, {})
    assert sweep_of("{method: [none]}", "budget.max_usd=100").code == 0


def children(uri: str, parent: str) -> list[Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")


@pytest.mark.slow
def test_mlflow_dies_in_mid_sweep_and_the_same_command_writes_what_is_missing(sweep_of, tmp_path, monkeypatch):
    uri, dead = f"sqlite:///{tmp_path / 'mlflow.db'}", f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made, real = [], sweep_track.make_tracker

    def dying(enabled: bool, wanted: str | None, *rest: Any) -> Any:
        made.append(wanted)
        return real(enabled, wanted if len(made) <= 3 else dead, *rest)

    tracking = ("mlflow.enabled=true",)  # the store beside the output
    monkeypatch.setattr(sweep_track, "make_tracker", dying)
    hurt = sweep_of(GRID, *tracking)
    assert hurt.code == 0  # captions matter more
    assert "1 points are not in MLflow" in hurt.tracked
    assert "the same command writes them" in hurt.tracked
    monkeypatch.setattr(sweep_track, "make_tracker", real)
    healed = sweep_of(GRID, *tracking)
    assert (healed.skipped, healed.code) == (3, 0)
    parent = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["mlflow_run"]
    runs = {run.data.tags["point"]: run for run in children(uri, parent)}
    assert runs.keys() == healed.records.keys()
    [name] = [name for name in runs if name.startswith("otprune-0.25")]
    data, info, record = runs[name].data, runs[name].info, healed.records[name]
    assert info.run_name == name.removesuffix(f"-{record['key']}")
    assert info.end_time - info.start_time == pytest.approx(1000 * record["metrics"]["wall_seconds"], abs=2)
    assert "output.path" not in data.params
    assert data.metrics["accuracy/unpruned/relative"] == record["quality"]["relative"][0]
    assert data.metrics["images_per_second"] == record["metrics"]["images_per_second"]
    assert data.metrics["usd_per_million_images_steady"] == record["metrics"]["usd_per_million_images_steady"]
    assert (data.tags["retention"], data.params["axis.method"]) == ("0.25", "otprune")
    whole = MlflowClient(uri).get_run(parent)
    assert (whole.info.status, whole.data.metrics["points_finished"]) == ("FINISHED", 3)


class FakeCluster:
    """A Ray dashboard's client whose cluster is this process: a submitted command runs at once."""

    def __init__(self) -> None:
        self.jobs: dict[str, int] = {}

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict, metadata: dict) -> str:
        assert (Path(runtime_env["working_dir"]) / "jobs" / "caption_corpus.py").exists()
        job = prepare(load_config([*shlex.split(entrypoint)[2:], LOCAL]), fakes())
        self.jobs[submission_id] = run_job(job, conclude=report_captions).code
        return submission_id

    def get_job_status(self, submission_id: str) -> Any:
        if submission_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist.")
        return sweep_submit.JobStatus.FAILED if self.jobs[submission_id] else sweep_submit.JobStatus.SUCCEEDED

    def get_job_info(self, submission_id: str) -> Any:
        return SimpleNamespace(driver_exit_code=self.jobs[submission_id])

    def get_job_logs(self, submission_id: str) -> str:
        return "starting\nerror: out of luck\n"


def test_points_of_another_cluster_are_submitted_and_measured_alike(sweep_of, monkeypatch):
    cluster = FakeCluster()
    monkeypatch.setattr(sweep_submit, "connect", lambda address: cluster)
    clusters = "[{name: here}, {name: there, address: 'http://x:1'}]"
    outcome = sweep_of(f"{{method: [none], cluster: {clusters}}}", "sweep.poll_seconds=0.01")
    assert outcome.code == 0
    here, there = outcome.records.values()
    assert here["fingerprint"] == there["fingerprint"]
    assert here["totals"]["captions"] == there["totals"]["captions"] == 8
    assert there["quality"]["agreement"]["exact_match"][0] == 1  # with its own captions
    assert list(cluster.jobs) == [f"{there['name']}-0"]


def test_a_submitted_job_that_fails_says_why_and_is_submitted_anew(sweep_of, monkeypatch):
    cluster = FakeCluster()
    cluster.submit_job = lambda *, submission_id, **_: cluster.jobs.setdefault(submission_id, 1)
    monkeypatch.setattr(sweep_submit, "connect", lambda address: cluster)
    grid = "{method: [none], cluster: [{name: there, address: 'http://x:1'}]}"
    for attempt in range(2):
        (record,) = sweep_of(grid, "sweep.poll_seconds=0.01").records.values()
        assert record["reason"] == f"job {record['name']}-{attempt} failed: error: out of luck"


def test_the_heartbeat_of_a_submitted_job_says_why_it_failed(sweep_of, monkeypatch, tmp_path):
    """Not its log, and not the heartbeat that an earlier run left."""
    cluster, beats = FakeCluster(), iter([b'{"message": "the weights are gone"}', None])

    def fail(*, submission_id: str, metadata: dict, **_: object) -> str:
        if beat := next(beats):
            Store(str(tmp_path / "sweep" / "points" / metadata["point"])).write("heartbeat.json", beat)
        cluster.jobs[submission_id] = 1
        return submission_id

    cluster.submit_job = fail
    monkeypatch.setattr(sweep_submit, "connect", lambda address: cluster)
    grid = "{method: [none], cluster: [{name: there, address: 'http://x:1'}]}"
    reasons = [next(iter(sweep_of(grid, "sweep.poll_seconds=0.01").records.values()))["reason"] for _ in range(2)]
    assert reasons[0].endswith("-0 failed: the weights are gone")
    assert reasons[1].endswith("-1 failed: error: out of luck")


def test_an_interrupt_stays_one_where_the_other_cluster_does_not_answer_any_more(sweep_of, monkeypatch, caplog):
    cluster = FakeCluster()

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    def gone() -> None:
        raise ConnectionError("nobody there")

    cluster.submit_job, cluster.list_jobs = interrupted, gone  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(sweep_submit, "connect", lambda address: cluster)
    outcome = sweep_of("{method: [none], cluster: [{name: there, address: 'http://x:1'}]}", "sweep.poll_seconds=0.01")
    assert outcome.code == 130
    assert "may still run on http://x:1" in caplog.text


def test_a_wrong_address_is_told_from_a_cluster_that_is_down():
    with pytest.raises(UserError, match="must be that of a Ray dashboard"):
        sweep_submit.connect("ray://host:10001")


KILLED = """
import sys
sys.path[:0] = ["."]
from tests.sweep.test_run import shortening_encoder, wording_generator
from pipelines.sweep.config import SweepConfig
from pipelines.config.load import load_config
from pipelines.run.job import Actors
from pipelines.sweep.checked import prepare_sweep
from pipelines.sweep.run import run_sweep

class Slow(shortening_encoder()):
    def __call__(self, row):
        import time
        time.sleep(0.5)
        return super().__call__(row)

run_sweep(prepare_sweep(load_config(sys.argv[1:], SweepConfig), Actors(Slow, wording_generator())))
"""


@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_sweep_goes_on_where_it_was(sweep_of, corpus, tmp_path):
    settings = [*DEMO, LOCAL, "unit.images=2", "run.samples=2", "mlflow.enabled=false", "cost.usd_per_hour=3.6"]
    settings.append("sweep.baselines=false")
    paths = [f"input.path={corpus}", f"output.path={tmp_path / 'sweep'}", f"sweep.grid={GRID}"]
    with (tmp_path / "log").open("wb") as log:
        killed = subprocess.Popen(
            [sys.executable, "-c", KILLED, *settings, *paths],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 200
        points = tmp_path / "sweep" / "points"
        while True:  # until one point is finished and another has committed some of its units
            assert killed.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            parts = [len(list(folder.glob("captions/*.parquet"))) for folder in points.glob("*")]
            if list(points.glob("*/point.json")) and any(0 < count < 4 for count in parts):
                break
            time.sleep(0.02)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait(30)
    finished = len(list(points.glob("*/point.json")))
    outcome = sweep_of()
    assert (outcome.code, outcome.skipped, len(outcome.records)) == (0, finished, 3)
    assert 1 <= finished < 3
    for record in outcome.records.values():
        assert addresses(points / record["name"]) == [("a.parquet", row) for row in range(8)]
        assert record["metrics"]["images_captioned"] >= 4  # its speed is that of half of its images at least


def test_a_sweep_cannot_be_written_where_nothing_can(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config([*DEMO, f"output.path={tmp_path / 'file' / 'x'}", f"sweep.grid={GRID}"], SweepConfig)
    with pytest.raises(UserError, match="must be writable"):
        prepare_sweep(config)
