"""The accuracy grid, with stages that answer right as often as tokens are kept: its table, page, runs and resume."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient

from demo.corpus import SCHEMA
from demo.language import questions
from demo.world import scene_at
from jobs.evaluate_grid import DEMO_CONFIG, main
from otprune import num_kept, select_tokens
from otprune.distance import gaussian_w2, trace_objective
from otprune.flops import true_flops
from otprune.methods import get_method
from otprune.models import llava_encoder, read_checkpoint
from pipelines.accuracy.config import AccuracyConfig, GridConfig
from pipelines.accuracy.distance import without_distance
from pipelines.accuracy.grid import grid_points, run_accuracy_grid
from pipelines.accuracy.point_cost import encoded_on_cpu, measure_work
from pipelines.accuracy.table import Measured, Point, accuracy_table, relative_scores
from pipelines.benchmarks import Benchmark, Comparison, get_benchmark
from pipelines.config.keys import PruneConfig
from pipelines.config.load import load_config
from pipelines.run.job import Actors
from pipelines.run.outcome import Cluster
from pipelines.stages.ragged import Ragged
from pipelines.stages.unit_batch import Answer, UnitBatch
from pipelines.store import Store
from tests.conftest import REPOSITORY, scene_row
from tests.helpers import LOCAL

TOKENS = 256


def luck(question_id: str) -> int:
    """Tokens that it takes to answer this question."""
    return zlib.crc32(question_id.encode()) % TOKENS


def counting_encoder(always: dict[str, int] | None = None) -> type:
    """As many empty tokens an image as are to be kept; `always` so many of some methods."""

    class Counting:
        def __init__(self, *, prune: PruneConfig, **_: object) -> None:
            kept = 256 if get_method(prune.method).keeps_all else round(256 * prune.share)
            self.kept = (always or {}).get(prune.method, kept)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            for image in unit_batch.images:
                image.num_visual_tokens = 256 * image.num_pictures
            rows = [np.zeros((self.kept, 1), np.float32) for _ in unit_batch.images]
            unit_batch.arrays = {"tokens": Ragged.of(rows, np.zeros((0, 1), np.float32))}
            return unit_batch.to_row()

    return Counting


def lucky_generator() -> type:
    """Answers a question right if there are enough tokens."""

    class Lucky:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            import zlib

            unit_batch = UnitBatch.from_row(row)
            for image, kept in zip(unit_batch.images, unit_batch.arrays["tokens"].lengths.tolist(), strict=True):
                texts = [
                    q.answers[0] if zlib.crc32(q.question_id.encode()) % 256 < kept else "what" for q in image.questions
                ]
                image.answers = [Answer(text, kept, kept + 6, 2, "stop") for text in texts]
            unit_batch.arrays = {}
            return unit_batch.to_row()

    return Lucky


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, scene_png: Callable[[int], bytes]) -> Path:
    """Sixteen scenes with their questions."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = [
        {**scene_row(i, scene_png(i)), "questions": questions(scene_at("corpus", i), random.Random(i))}
        for i in range(16)
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "scenes-00000.parquet", row_group_size=8)
    return folder


def configure(scenes: Path, output: Path, *arguments: str) -> AccuracyConfig:
    settings = [
        f"--config={DEMO_CONFIG}", f"model.path={REPOSITORY / 'demo' / 'checkpoint'}", f"input.path={scenes}",
        f"output.path={output}", "benchmarks=[demo_exist,demo_attr,demo_count]", "limit=null", "resamples=50",
        "grid.methods=[otprune,random]", "grid.retentions=[0.1]", "grid.distance_images=3",
        "faults.no_progress_seconds=120", LOCAL, *arguments,
    ]  # fmt: skip
    return load_config(settings, AccuracyConfig, DEMO_CONFIG)


@pytest.fixture(scope="module")
def grid(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """Output folder and table."""
    output = tmp_path_factory.mktemp("grid") / "out"
    return output, run_accuracy_grid(configure(scenes, output), Actors(counting_encoder(), lucky_generator()))


def test_every_point_answers_every_question(grid: tuple[Path, pa.Table], scenes: Path):
    asked = pq.read_table(scenes, columns=["id", "questions"]).to_pylist()
    rows = grid[1].to_pylist()
    assert len(rows) == 3 * 3
    for row in rows:
        task = row["benchmark"].removeprefix("demo_")
        ids = [
            f"{scene['id']}#{task}-{i}"
            for scene in asked
            for i in range(sum(question["task"] == task for question in scene["questions"]))
        ]
        kept = round(TOKENS * row["retention"])
        assert row["questions"] == len(ids)
        assert row["score"] == pytest.approx(100 * np.mean([luck(each) < kept for each in ids]))
        assert row["num_kept_tokens"] == kept


def test_relative_is_the_mean_share_of_the_unpruned_scores(grid: tuple[Path, pa.Table]):
    rows = grid[1].to_pylist()
    full = {row["benchmark"]: row["score"] for row in rows if row["method"] == "none"}
    for row in rows:
        same = [r for r in rows if (r["method"], r["retention"]) == (row["method"], row["retention"])]
        assert row["relative"] == pytest.approx(np.mean([r["score"] / full[r["benchmark"]] for r in same]))
        assert row["relative_low"] <= row["relative"] <= row["relative_high"]


def test_points_are_held_against_the_unpruned_and_against_random(grid: tuple[Path, pa.Table]):
    for row in grid[1].to_pylist():
        if row["method"] == "none":
            assert row["vs_none_p"] is row["vs_random_p"] is None
        else:
            assert row["vs_none"] == pytest.approx(row["score"] - 100)
            assert row["vs_none_p"] <= row["vs_none_q"]
        if row["method"] == "otprune":  # which answers exactly as random does here
            assert (row["vs_random"], row["vs_random_p"]) == (0, 1)


def test_fewer_tokens_cost_less(grid: tuple[Path, pa.Table]):
    cost = {(row["method"], row["retention"]): row["tflops_per_image"] for row in grid[1].to_pylist()}
    assert cost["none", 1.0] > cost["otprune", 0.1] > cost["random", 0.1] > 0


def test_a_point_costs_what_the_algorithm_of_its_device_does(grid: tuple[Path, pa.Table], demo_model: Path):
    shape = read_checkpoint(str(demo_model)).shape
    rows = [row for row in grid[1].to_pylist() if row["method"] == "otprune"]
    flops = true_flops(shape, "otprune", num_text=6, num_generated=2, retention=26 / TOKENS, select_on_cpu=True)
    assert {row["tflops_per_image"] for row in rows} == {flops.total / 1e12}
    accelerator = true_flops(shape, "otprune", num_text=6, num_generated=2, retention=26 / TOKENS)
    assert flops.policy < accelerator.policy


@pytest.mark.parametrize(
    ("num_gpus", "cluster", "on_cpu"),
    [
        (0, Cluster("embedded", 16, 1), True),
        (0.3, Cluster("joined before", 16, 0), False),
        (None, Cluster("embedded", 16, 1), False),
        (None, Cluster("ray://host:10001", 16, 0, "http://host:8265"), True),
    ],
)
def test_the_record_says_where_the_tokens_were_chosen(num_gpus: float | None, cluster: Cluster, on_cpu: bool):
    record = {"config": {"encode.num_gpus": num_gpus}, "cluster": cluster.to_dict()}
    assert encoded_on_cpu(json.loads(json.dumps(record))) == on_cpu


def test_a_record_that_holds_a_text_or_no_cluster_is_read():
    for cluster in ("embedded Ray: 16 CPUs, 0 GPUs", None):
        assert encoded_on_cpu({"config": {"encode.num_gpus": 0}, "cluster": cluster})
        assert encoded_on_cpu({"config": {"encode.num_gpus": None}, "cluster": cluster}), "no Ray here has a GPU"


def test_a_point_that_nothing_answered_has_no_cost(demo_model: Path, tmp_path: Path):
    output = Store(str(tmp_path))
    config = load_config(["prune.method=random", "prune.retention=0.1"], AccuracyConfig, DEMO_CONFIG)
    totals = {"images_captioned": 0, "seconds": {}}
    record = {"totals": totals, "last_run": {}, "config": {"encode.num_gpus": 0}, "cluster": None}
    output.write("run.json", json.dumps(record).encode())
    checkpoint = read_checkpoint(str(demo_model))
    job = SimpleNamespace(config=config, output=output, folder="predictions", checkpoint=checkpoint, pruning={})
    work = measure_work(job)
    assert (work["tflops_per_image"], work["num_kept_tokens"]) == (None, 0)


def test_distances_are_those_of_the_selected_tokens(grid: tuple[Path, pa.Table], demo_model: Path, scene_pixels):
    encoder = llava_encoder.load(read_checkpoint(str(demo_model)), dtype=torch.float32, device="cpu")
    features = encoder(torch.from_numpy(scene_pixels[:3]))
    keep = select_tokens(features, num_kept(0.1, TOKENS), method="otprune", gamma_scale="trace")
    [row] = [r for r in grid[1].to_pylist() if (r["method"], r["retention"]) == ("otprune", 0.1)][:1]
    # The corpus stores every fourth scene as JPEG; the fixtures are PNG throughout.
    trace = trace_objective(features, keep, normalize_columns=True)
    assert row["trace_objective"] == pytest.approx(float(trace.mean()), rel=1e-5)
    assert row["gaussian_w2"] == pytest.approx(float(gaussian_w2(features, keep).mean()), rel=1e-5)
    assert all(r["gaussian_w2"] is None for r in grid[1].to_pylist() if r["method"] == "none")


def test_distances_of_another_sample_or_of_raw_columns_are_measured_again(demo_model: Path, tmp_path: Path):
    output = Store(str(tmp_path))
    config, checkpoint = load_config([], AccuracyConfig, DEMO_CONFIG), read_checkpoint(str(demo_model))
    job = SimpleNamespace(config=config, output=output, checkpoint=checkpoint)
    values = {"trace_objective": 0.5, "gaussian_w2": 2.0, "images": 3}
    for asked, known in (
        ({"asked": 3}, False),
        ({"asked": 4, "normalize_columns": True}, False),
        ({"asked": 3, "normalize_columns": True}, True),
    ):
        output.write("distance.json", json.dumps(values | asked).encode())
        point = Measured(Point("otprune", 0.1), job, {}, {}, {})
        assert without_distance([point], 3) == ([] if known else [point])
        assert point.distance.get("gaussian_w2") == (2.0 if known else None)


def exist_scores(right: list[bool]) -> tuple[Benchmark, Measured]:
    """demo_exist, one question an image, and a point with these answers."""
    bench = get_benchmark("demo_exist")
    records = [
        {"question_id": f"q{i:03d}", "group_id": f"q{i:03d}", "category": "", "kind": "yesno", "choices": []}
        | {"answers": ["yes" if i % 2 else "no"], "prediction": "yes" if (i % 2 == 1) == each else "no"}
        for i, each in enumerate(right)
    ]
    scores = bench.score(records, resamples=50)
    images = {bench.name: {group: group for group in scores.group_ids}}
    return bench, Measured(Point("none", 1.0), SimpleNamespace(), {bench.name: scores}, images, {"budget": 1.0})


def test_points_are_compared_on_the_same_resamples():
    some, others = ([i % period > 0 for i in range(60)] for period in (3, 4))
    bench, full = exist_scores([True] * 60)
    points = [full, *(exist_scores(right)[1] for right in (some, some, others))]
    relative = relative_scores(points, [bench], 200)
    assert relative.difference(1, 2) == (0, 0, 0)
    low, high = relative.interval(1)
    assert low < relative.values[1] < high
    difference, lowest, highest = relative.difference(1, 3)
    assert difference == pytest.approx(relative.values[1] - relative.values[3]) != 0
    assert lowest <= difference <= highest


def test_q_is_p_after_benjamini_and_hochberg():
    """q of the i-th smallest of m is the smallest m p_(j) / j over j >= i; what was not compared does not count."""
    ps = {"a": 0.03, "b": 0.01, "c": 0.028, "d": 0.9}
    by_size = sorted(ps, key=ps.__getitem__)
    expected = {each: min(4 * ps[by_size[j]] / (j + 1) for j in range(i, 4)) for i, each in enumerate(by_size)}
    assert expected == pytest.approx({"a": 0.04, "b": 0.04, "c": 0.04, "d": 0.9})
    bench, full = exist_scores([True] * 8)

    class Known:
        """The benchmark, with these p-values."""

        name, scorer = bench.name, bench.scorer
        left = iter(ps.values())

        def compare(self, *_: object, **__: object) -> Comparison:
            return Comparison(difference=0.0, interval=(0.0, 0.0), test="mcnemar", p=next(self.left), better=0, worse=0)

    points = [full, *(replace(full, point=Point(method, 0.1)) for method in ps)]
    rows = accuracy_table(points, [Known()], 50).to_pylist()
    assert {row["method"]: row["vs_none_q"] for row in rows} == pytest.approx({"none": None, **expected})


def test_the_page_shows_every_point_and_needs_nothing_else(grid: tuple[Path, pa.Table]):
    page = (grid[0] / "accuracy.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    for word in ("otprune", "random", "all tokens", "10 % of the tokens", "Who beats whom"):
        assert word in page
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(chart)


def test_points_are_runs_below_one_run_of_the_grid(grid: tuple[Path, pa.Table]):
    output = grid[0]
    client = MlflowClient(f"sqlite:///{output.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("accuracy")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    parent = json.loads((output / "grid.json").read_text())["mlflow_run"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert {"none", "otprune-0.1", "random-0.1"} <= {run.info.run_name for run in children}
    [top] = [run for run in runs if run.info.run_id == parent]
    assert top.info.status == "FINISHED"
    assert top.data.metrics["relative/none"] == 1
    assert {item.path for item in client.list_artifacts(parent)} >= {"accuracy.html", "accuracy.parquet"}


def test_a_finished_grid_is_read_again_and_can_grow(
    grid: tuple[Path, pa.Table], scenes: Path, tmp_path: Path, monkeypatch
):
    output, table = shutil.copytree(grid[0], tmp_path / "out"), grid[1]
    quiet = configure(scenes, output, "mlflow.enabled=false")

    def refuse(*_: object) -> None:
        raise AssertionError("a finished point was evaluated again")

    with monkeypatch.context() as patched:
        patched.setattr("pipelines.run.stages.local_flow", refuse)
        again = run_accuracy_grid(quiet, Actors(counting_encoder(), lucky_generator()))
    timing = ["images_per_second", "ms_per_image", "encode_ms", "generate_ms"]
    assert again.drop_columns(timing).equals(table.drop_columns(timing))
    more = ("mlflow.enabled=false", "grid.methods=[otprune]", "grid.retentions=[0.1,0.5]", "grid.distance_images=0")
    grown = run_accuracy_grid(configure(scenes, output, *more), Actors(counting_encoder(), lucky_generator()))
    assert set(grown["num_kept_tokens"].to_pylist()) == {256, 128, 26}
    assert set(grown["vs_random_p"].to_pylist()) == {None}


def test_points_over_budget_stand_in_the_table_alone(scenes: Path, tmp_path: Path):
    """An encoder that gives M3 its next grid up, as M3 does between its grids."""
    settings = ("mlflow.enabled=false", "grid.methods=[otprune,m3]", "benchmarks=[demo_attr]")
    counting = counting_encoder({"m3": 64})
    table = run_accuracy_grid(
        configure(scenes, tmp_path, *settings, "grid.distance_images=0"), Actors(counting, lucky_generator())
    )
    assert {row["method"] for row in table.to_pylist() if row["over_budget"]} == {"m3"}
    page = (tmp_path / "accuracy.html").read_text()
    assert "Not compared at 10 %, because their prefill costs over a tenth more: m3." in page
    short = page[page.index("In short") : page.index("Not compared")]
    assert "m3" not in short
    assert page.count("over budget</small>") == 1


@pytest.mark.slow
def test_fitprune_is_fitted_to_the_grids_own_images_once(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = (
        "mlflow.enabled=false", "grid.methods=[fitprune,random]", "grid.retentions=[0.5,0.3]",
        "grid.calibration_images=6", "grid.distance_images=0", "benchmarks=[demo_attr]",
    )  # fmt: skip
    config = configure(scenes, tmp_path, *settings)
    run_accuracy_grid(config, Actors(counting_encoder(), lucky_generator()))
    stored = json.loads((tmp_path / "recipes.json").read_text())
    assert stored["images"] == 6
    deleted = {retention: sum(recipe.values()) for retention, recipe in stored["recipes"].items()}
    assert deleted.keys() == {"0.5", "0.3"}
    assert 0 < deleted["0.5"] < deleted["0.3"]
    claim = (tmp_path / "points" / "fitprune-0.5" / "fingerprint.json").read_text()
    assert all(f'"{layer}": {number}' in claim for layer, number in stored["recipes"]["0.5"].items())

    def refuse(*_: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("pipelines.accuracy.grid.fit_recipes", refuse)
    run_accuracy_grid(config, Actors(counting_encoder(), lucky_generator()))


def test_points_come_with_their_references_first():
    points = grid_points(GridConfig(methods=["otprune", "random", "none"], retentions=[0.05, 0.5]))
    assert [point.name for point in points] == ["none", "random-0.5", "random-0.05", "otprune-0.5", "otprune-0.05"]
    assert points[0] == Point("none", 1.0)


def test_variants_of_a_method_stand_beside_it_with_settings_of_their_own(scenes: Path, tmp_path: Path):
    settings = (
        "mlflow.enabled=false", "benchmarks=[demo_attr]", "grid.distance_images=4", "prune.gamma_scale=trace",
        "grid.methods=[otprune,otprune:released,cdpruner:words]",
        "grid.settings={otprune:released: {gamma: 0.01, gamma_scale: released}, cdpruner:words: {relevance: words}}",
    )  # fmt: skip
    table = run_accuracy_grid(configure(scenes, tmp_path, *settings), Actors(counting_encoder(), lucky_generator()))
    rows = {row["method"]: row for row in table.to_pylist()}
    assert list(rows) == ["none", "otprune", "otprune:released", "cdpruner:words"]
    assert rows["otprune:released"]["trace_objective"] != rows["otprune"]["trace_objective"]
    claim = json.loads((tmp_path / "points" / "cdpruner.words-0.1" / "fingerprint.json").read_text())
    assert '"relevance": "words"' in json.dumps(claim)
    assert "cdpruner:words" in (tmp_path / "accuracy.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["grid.methods=[otprun]"], "prune.method must be one of"),
        (["grid.methods=[random,resize]"], "prune.method=resize needs a model of free picture size"),
        (["grid.methods=[]"], "grid.methods and grid.retentions must name at least one"),
        (["grid.retentions=[0.5,1.5]"], "grid.retentions must be above 0 and at most 1, got 1.5"),
        (["grid.settings={fastv: {layer: 2}}"], "grid.settings must be of methods in grid.methods, got 'fastv'"),
        (["grid.methods=[otprune:mine]"], "grid.settings must define the variant 'otprune:mine'"),
        (["grid.settings.otprune=2"], "grid.settings of otprune must map settings to values, got 2"),
        (["grid.settings.otprune.gamma=-1"], "prune.gamma must be above 0, got -1"),
        (["grid.settings.otprune.gamma_scale=mine"], "prune.gamma_scale"),
        (["benchmarks=pop"], "benchmark must be one of"),
    ],
)
def test_mistakes_end_with_code_2(arguments: list[str], says: str, scenes: Path, tmp_path: Path, capsys):
    settings = [f"--config={DEMO_CONFIG}", f"input.path={scenes}", f"output.path={tmp_path / 'out'}", *arguments]
    assert main(settings) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
