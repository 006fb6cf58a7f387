"""The flow without Ray: the same stages in this process, and the same rows as by Ray."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.load import load_config
from pipelines.run.job import Actors, prepare
from pipelines.run.outcome import read_cluster
from pipelines.store import Store, read_json
from tests.helpers import (
    LOCAL,
    QUICK,
    addresses,
    captions_of,
    fake_encoder,
    fake_generator,
    run_captions,
    run_fake,
    write_corpus,
)


@pytest.fixture
def corpus(tmp_path: Path, scene_png: Callable[[int], bytes]) -> Path:
    return write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i) for i in range(5)] + [None])


def test_a_job_without_ray_commits_the_rows_of_a_job_on_ray(ray_session, corpus, tmp_path):
    """On both, the actors were held and worked for a share of the time."""
    for name, on_ray in (("here", False), ("ray", True)):
        outcome = run_fake(
            f"input.path={corpus}",
            f"output.path={tmp_path / name}",
            "unit.images=2",
            encoder=fake_encoder(seconds=0.2),
            on_ray=on_ray,
        )
        assert outcome.code == 0
        assert 0 < outcome.metrics["gpu_busy/encode"] <= 1
        assert 0 <= outcome.metrics["gpu_busy/generate"] < outcome.metrics["gpu_busy/encode"]
        assert outcome.metrics["gpu_busy/encode"] < 1, "an actor is held before its first unit"
    assert captions_of(tmp_path / "here") == captions_of(tmp_path / "ray")
    assert addresses(tmp_path / "here") == addresses(tmp_path / "ray")
    names = [sorted(path.name for path in (tmp_path / name / "captions").iterdir()) for name in ("here", "ray")]
    assert names[0] == names[1]


def test_stages_run_in_this_process_and_may_be_coroutines(corpus, tmp_path):
    processes = set()

    class Coroutine(fake_generator()):
        async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            processes.add(os.getpid())
            return super().__call__(row)

    outcome = run_fake(f"input.path={corpus}", f"output.path={tmp_path}", "unit.images=2", generator=Coroutine)
    assert (outcome.code, processes) == (0, {os.getpid()})
    assert {"gpu_busy/encode", "gpu_busy/generate"} <= outcome.metrics.keys(), "both actors were held"
    assert len(addresses(tmp_path)) == 6
    cluster = read_cluster((read_json(Store(str(tmp_path)), "run.json") or {})["cluster"])
    assert cluster is not None
    assert (cluster.address, cluster.cpus) == ("none", os.cpu_count())
    assert cluster == outcome.cluster


def test_a_stage_that_cannot_start_ends_the_job_and_says_why(corpus, tmp_path):
    class Broken(fake_encoder()):
        def __init__(self, **_: object) -> None:
            raise FileNotFoundError("the weights are gone")

    outcome = run_fake(f"input.path={corpus}", f"output.path={tmp_path}", encoder=Broken)
    assert outcome.code == 1
    assert "a stage gave up: FileNotFoundError: the weights are gone; everything committed is kept" in outcome.message


def test_this_process_is_a_node_that_only_a_price_of_the_whole_cluster_prices(corpus, tmp_path):
    actors = Actors(fake_encoder(), fake_generator())
    config = load_config([*QUICK, LOCAL, f"input.path={corpus}", f"output.path={tmp_path}", "unit.images=2"])
    priced = replace(config, cost=replace(config.cost, usd_per_hour=3600.0))
    metrics = run_captions(prepare(priced, actors)).metrics
    assert metrics["usd_total"] == pytest.approx(metrics["wall_seconds"], rel=0.01)
    again = replace(
        config,
        cost=replace(config.cost, usd_per_hour=None),
        output=replace(config.output, path=str(tmp_path / "again")),
    )
    metrics = run_captions(prepare(again, actors)).metrics
    assert metrics["nodes_unpriced"] == 1
    assert "usd_total" not in metrics


def test_the_real_stages_run_in_this_process(corpus, tmp_path):
    """The command line, the demo model, breakpoints and all."""
    from jobs.caption_corpus import main

    assert main([*QUICK, LOCAL, f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "input.limit=2"]) == 0
    assert len(captions_of(tmp_path / "out")) == 2
