"""Benchmarks through the evaluation job: every published layout, shared images, limits, faults, resume, comparison."""

import contextlib
import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.corpus import SCHEMA
from demo.language import questions
from demo.world import scene_at
from jobs.evaluate import DEMO_CONFIG, main
from pipelines.accuracy.config import EvaluateConfig
from pipelines.accuracy.evaluate import Results, prepare_evaluation, run_evaluation
from pipelines.accuracy.schema import PREDICTIONS
from pipelines.benchmarks import DEMO, PUBLISHED, get_benchmark
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.output.reader import read_totals
from pipelines.run.job import Actors
from pipelines.run.outcome import Outcome
from pipelines.stages.unit_batch import Answer, Question, UnitBatch
from pipelines.store import Store
from tests.benchmark_fixtures import FIXTURES, picture, write_fixtures
from tests.conftest import REPOSITORY, scene_row
from tests.helpers import LOCAL, fake_encoder, fake_generator, killing, read_rows

SETTINGS = (
    f"--config={DEMO_CONFIG}",
    f"model.path={REPOSITORY / 'demo' / 'checkpoint'}",
    "limit=null",
    "resamples=50",
    "faults.no_progress_seconds=120",
)
QUIET = (*SETTINGS, "mlflow.enabled=false")
ASKED = {  # questions of tests/benchmark_fixtures.py
    "coco2017_cap_val": 3, "flickr30k_test": 4, "gqa": 4, "mmbench_en_dev": 6, "mme": 6, "mmmu_val": 3, "nocaps_val": 4,
    "ok_vqa_val2014": 3, "pope": 6, "scienceqa_img": 3, "seedbench": 2,
    **{bench.name: 1 if bench.name == "demo_text" else 2 for bench in DEMO},
}  # fmt: skip


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and stdout of the command line."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        code = main(list(arguments))
    return code, stream.getvalue()


def run_fake(*arguments: str, encoder: type | None = None, on_ray: bool = False) -> tuple[Outcome, Results | None]:
    """The whole evaluation, but for stages without models."""
    config = load_config([*QUIET, *([] if on_ray else [LOCAL]), *arguments], EvaluateConfig, DEMO_CONFIG)
    return run_evaluation(prepare_evaluation(config, actors=Actors(encoder or fake_encoder(), fake_generator())))


def predictions(output: Path) -> list[dict[str, Any]]:
    return read_rows(output, "predictions")


def scores(output: Path) -> dict[str, Any]:
    return json.loads((output / "scores.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_fixtures(folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The fixtures, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "in"))


def rewrite(path: Path, change: Callable[[list[dict]], None], schema: pa.Schema | None = None) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema or table.schema), path, row_group_size=2)


# Every benchmark through the whole job, once.


@pytest.fixture(scope="module")
def everything(folder: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("everything") / "out"
    arguments = (f"input.path={folder}", f"output.path={output}", "generate.max_new_tokens=6", "unit.images=4")
    code, text = run(*SETTINGS, *arguments, "benchmarks=[all,demo]")
    assert code == 0, text
    return output, text


def test_every_question_of_every_benchmark_is_predicted_once(everything: tuple[Path, str]):
    rows = predictions(everything[0])
    assert Counter(row["benchmark"] for row in rows) == ASKED
    assert len({(row["benchmark"], row["question_id"]) for row in rows}) == len(rows) == sum(ASKED.values())
    assert all(row["prediction"] is not None for row in rows)
    assert not (everything[0] / "quarantine").exists()
    for path in (everything[0] / "predictions").iterdir():
        assert pq.read_schema(path).remove_metadata() == PREDICTIONS


def test_predictions_hold_the_prompt_and_what_it_cost(everything: tuple[Path, str]):
    [row] = [r for r in predictions(everything[0]) if r["benchmark"] == "pope" and r["question_id"] == "popular/2"]
    assert row["prompt"] == "Is there a car in the image?\nAnswer the question using a single word or phrase."
    assert (row["num_visual_tokens"], row["num_kept_tokens"]) == (256, 25)
    assert row["num_prompt_tokens"] > 25
    assert 1 <= row["num_generated_tokens"] <= 6
    assert (row["source"], row["row"]) == ("POPE/data/test-00000-of-00003.parquet", 3)
    assert (row["method"], row["answers"], row["category"]) == ("otprune", ["no"], "popular")


def test_rows_are_numbered_over_all_files(everything: tuple[Path, str]):
    ids = [row["question_id"] for row in predictions(everything[0]) if row["benchmark"] == "scienceqa_img"]
    assert sorted(ids) == ["0", "1", "2"]
    coco = {row["question_id"]: row["source"] for row in predictions(everything[0]) if row["group_id"] == "632"}
    assert coco == {"632": "COCO-Caption2017/data/val-00001-of-00002.parquet"}


def test_every_image_of_a_question_is_pruned(everything: tuple[Path, str]):
    rows = {row["question_id"]: row for row in predictions(everything[0]) if row["benchmark"] == "mmmu_val"}
    one, two = rows["validation_Art_1"], rows["validation_Art_Theory_12"]
    assert (one["num_visual_tokens"], one["num_kept_tokens"]) == (256, 25)
    assert (two["num_visual_tokens"], two["num_kept_tokens"]) == (512, 50)


def test_scores_are_those_of_the_predictions(everything: tuple[Path, str]):
    output, text = everything
    rows, written = predictions(output), scores(output)
    assert set(written) == set(ASKED)
    for bench in (*PUBLISHED, *DEMO):
        expected = bench.score([row for row in rows if row["benchmark"] == bench.name], resamples=50)
        found = written[bench.name]
        assert found["metrics"] == expected.metrics
        assert {name: tuple(ends) for name, ends in found["intervals"].items()} == expected.intervals
        assert found["categories"] == expected.categories
        assert (found["questions"], found["unanswered"]) == (ASKED[bench.name], expected.unanswered)
        assert re.search(rf"^{bench.name} +{bench.scorer.headline} ", text, re.MULTILINE)
    assert json.loads((output / "run.json").read_text())["scores"] == written


def test_the_page_and_mlflow_show_the_scores(everything: tuple[Path, str]):
    from mlflow.tracking import MlflowClient

    output, _ = everything
    page = (output / "scores.html").read_text()
    assert all(name in page for name in ASKED)
    assert "https://" not in page
    client = MlflowClient(f"sqlite:///{output.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("benchmarks")
    assert experiment
    [tracked] = client.search_runs([experiment.experiment_id])
    metrics = tracked.data.metrics
    for name, score in scores(output).items():
        for metric, value in score["metrics"].items():
            low, high = score["intervals"][metric]
            path = f"accuracy/{name}/{metric}"
            assert (metrics[path], metrics[f"{path}/low"], metrics[f"{path}/high"]) == pytest.approx((value, low, high))
    assert metrics["questions_per_second"] > 0
    assert 0 < metrics["prefill_tflops_per_image"] < 1e-3
    tags = {name: tracked.data.tags[name] for name in ("method", "retention", "engine", "benchmarks")}
    assert tags == {
        "method": "otprune", "retention": "0.098", "engine": "transformers", "benchmarks": ",".join(sorted(ASKED))
    }  # fmt: skip
    stored = {item.path for item in client.list_artifacts(tracked.info.run_id)}
    assert stored >= {"scores.json", "scores.html", "categories.json", "predictions.parquet", "config.yaml"}


# The demo world, where the model knows the answers.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, scene_png: Callable[[int], bytes]) -> Path:
    """24 scenes with their questions."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for index in range(24):
        asked = questions(scene_at("corpus", index), random.Random(index))
        rows.append({**scene_row(index, scene_png(index)), "questions": asked})
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "scenes-00000.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="module")
def unpruned(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unpruned") / "out"
    arguments = (f"input.path={scenes}", f"output.path={output}", "prune.method=none", "unit.images=8")
    assert run(*QUIET, LOCAL, *arguments)[0] == 0
    return output


@pytest.mark.slow
def test_the_unpruned_model_knows_what_is_there(unpruned: Path):
    found = scores(unpruned)
    assert found["demo_exist"]["metrics"]["pope_accuracy"] > 0.85
    assert found["demo_bg"]["metrics"]["exact_match"] > 0.85
    assert found["demo_caption"]["metrics"]["demo_CIDEr"] > 5


def test_an_image_of_nine_benchmarks_is_encoded_once(unpruned: Path):
    store = Store(str(unpruned))
    totals = [read_totals(store, name, "predictions") for name in store.list("predictions")]
    assert sum(total["images_captioned"] for total in totals) == 24
    assert sum(total["captions"] for total in totals) == len(predictions(unpruned)) > 8 * 24


@pytest.mark.slow
def test_a_run_that_lost_some_objects_ends_in_the_same_scores(unpruned: Path, scenes: Path, tmp_path: Path):
    output = Path(shutil.copytree(unpruned, tmp_path / "out"))
    before, text = scores(output), sorted(map(str, predictions(output)))
    for path in (output / "run.json", output / "scores.json", *sorted((output / "predictions").iterdir())[1:]):
        path.unlink()
    arguments = (*QUIET, LOCAL, f"input.path={scenes}", f"output.path={output}", "prune.method=none", "unit.images=8")
    code, printed = run(*arguments)
    assert code == 0
    assert "were done before this run" in printed
    assert scores(output) == before
    assert sorted(map(str, predictions(output))) == text


def test_a_complete_output_is_scored_without_a_cluster(unpruned: Path, scenes: Path):
    arguments = (*QUIET, f"input.path={scenes}", f"output.path={unpruned}", "prune.method=none")
    code, text = run(*arguments)
    assert code == 0
    assert "the output is complete" in text
    assert "demo_exist" in text


def test_two_outputs_are_compared_question_by_question(unpruned: Path, scenes: Path, tmp_path: Path):
    output = tmp_path / "out"
    arguments = ("prune.method=first", "prune.retention=0.02", f"baseline.path={unpruned}", "benchmarks=demo_exist")
    code, text = run(*QUIET, LOCAL, f"input.path={scenes}", f"output.path={output}", *arguments)
    assert code == 0
    assert "minus baseline" in text
    ours, theirs = (
        {row["question_id"]: row["prediction"] == row["answers"][0] for row in rows if row["benchmark"] == "demo_exist"}
        for rows in map(predictions, (output, unpruned))
    )
    compared = scores(output)["demo_exist"]["against_baseline"]
    assert compared["difference"] == pytest.approx((sum(ours.values()) - sum(theirs.values())) / len(ours))
    assert compared["worse"] == sum(theirs[key] and not ours[key] for key in ours) > 0
    assert compared["test"] == "mcnemar"
    assert "minus baseline" in (output / "scores.html").read_text()


def test_a_question_on_its_way_holds_every_column_of_the_predictions_that_is_no_answers():
    of_run = {"prediction", "model", "method", "sha256", "num_visual_tokens"}
    of_answer = {field.name for field in fields(Answer)}
    of_question = {field.name for field in fields(Question)} - {"max_new_tokens"}
    assert of_question == set(PREDICTIONS.names) - of_run - of_answer


# Sharing, limits and faults, without a model.


def counting(folder: Path) -> type:
    """An encoder without a model that notes how many pictures it saw."""

    class Counting(fake_encoder()):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            assert len(unit_batch.arrays["pixels"]) == sum(image.num_pictures for image in unit_batch.images)
            (folder / f"{unit_batch.unit.name}.{len(unit_batch.arrays['pixels'])}").touch()
            return super().__call__(row)

    return Counting


def test_equal_images_of_a_unit_are_decoded_and_encoded_once(folder: Path, tmp_path: Path):
    (seen := tmp_path / "seen").mkdir()
    arguments = (f"input.path={folder}", f"output.path={tmp_path / 'out'}", "benchmarks=[pope,gqa,mmmu_val,demo]")
    outcome, results = run_fake(*arguments, encoder=counting(seen))
    assert outcome.code == 0
    assert results
    encoded = sum(int(path.suffix[1:]) for path in seen.iterdir())
    assert encoded == 1 + 2 + 4 + 2  # POPE: 6 questions; GQA: 4; MMMU: 3, one about two pictures; demo: 17


def test_a_limit_takes_whole_scoring_groups_and_reads_only_their_units(folder: Path, tmp_path: Path):
    arguments = (f"input.path={folder}", f"output.path={tmp_path / 'out'}", "unit.images=2")
    outcome, results = run_fake(*arguments, "limit=1", "benchmarks=[mmbench_en_dev,mme,ok_vqa_val2014]")
    assert outcome.code == 0
    assert results
    asked = Counter(row["benchmark"] for row in predictions(tmp_path / "out"))
    assert asked == {"mmbench_en_dev": 4, "mme": 2, "ok_vqa_val2014": 1}
    assert {row["group_id"] for row in predictions(tmp_path / "out") if row["benchmark"] == "mmbench_en_dev"} == {"7"}
    sources = Counter(row["source"].split("/")[0] for row in predictions(tmp_path / "out"))
    assert sources == {"MMBench": 4, "MME": 2, "OK-VQA": 1}
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == 3 + 2 + 1
    assert outcome.metrics["images_captioned"] == 3 + 2 + 1  # MMBench's question 7 in three units


def test_questions_about_a_broken_image_count_as_wrong(copy: Path, tmp_path: Path):
    def spoil(rows: list[dict]) -> None:
        rows[1]["image"] = {"bytes": b"this is no image", "path": "x.jpg"}
        rows[1]["image_source"] = rows[4]["image_source"] = "COCO_val2014_000000000001"
        rows[4]["image"] = rows[1]["image"]

    rewrite(copy / "POPE" / "data" / "test-00000-of-00003.parquet", spoil)
    output = tmp_path / "out"
    outcome, results = run_fake(f"input.path={copy}", f"output.path={output}", "benchmarks=pope")
    assert outcome.code == 0
    assert results
    assert (results.scores[0].questions, results.scores[0].unanswered) == (6, 2)
    answers = {row["question_id"]: row["prediction"] for row in predictions(output)}
    assert [key for key, answer in answers.items() if answer is None] == ["adversarial/2", "random/1"]
    [rejected] = read_rows(output, "quarantine")
    assert (rejected["id"], rejected["reason"], rejected["row"]) == (
        "COCO_val2014_000000000001", "unsupported_format", 1
    )  # fmt: skip


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_image_that_kills_its_process_costs_its_own_questions_alone(copy: Path, tmp_path: Path):
    bench, path = get_benchmark("coco2017_cap_val"), copy / "COCO-Caption2017" / "data" / "val-00000-of-00002.parquet"
    rewrite(path, lambda rows: rows[1].update(image=picture("blue")))
    victim = sha256(picture("blue")["bytes"]).hexdigest()
    arguments = (f"input.path={copy}", f"output.path={tmp_path / 'out'}", f"benchmarks={bench.name}")
    # Half a CPU an actor: pytest keeps the log's exceptions, and with them dead actors that Ray has restarted.
    pools = ("encode.num_cpus=0.5", "generate.num_cpus=0.5", "faults.retries=0")
    outcome, results = run_fake(*arguments, *pools, on_ray=True, encoder=killing(fake_encoder(), {victim}))
    assert outcome.code == 0, outcome.message
    assert results
    answers = {row["question_id"]: row["prediction"] for row in predictions(tmp_path / "out")}
    assert {key for key, answer in answers.items() if answer is None} == {"285"}
    assert set(answers) == {"139", "285", "632"}
    [rejected] = read_rows(tmp_path / "out", "quarantine")
    assert (rejected["reason"], rejected["sha256"], rejected["id"]) == ("crash", victim, "285")


def test_a_file_without_questions_makes_no_units(folder: Path, tmp_path: Path):
    """SEED-Bench's videos are most of its bytes."""
    path = folder / "SEED-Bench" / "data" / "test-00000-of-00040.parquet"
    (tmp_path / "SEED-Bench" / "data").mkdir(parents=True)
    rows = pq.read_table(path)
    videos = pa.concat_tables([rows.slice(1, 1)] * 6)
    pq.write_table(pa.concat_tables([rows, videos]), tmp_path / "SEED-Bench" / "data" / path.name, row_group_size=3)
    arguments = (f"input.path={tmp_path}", f"output.path={tmp_path / 'out'}", "benchmarks=seedbench", "unit.images=3")
    evaluation = prepare_evaluation(load_config([*QUIET, *arguments], EvaluateConfig, DEMO_CONFIG))
    assert [(unit.start, unit.stop) for unit in evaluation.job.plan.units] == [(0, 3)]
    assert evaluation.job.plan.num_rows == 2


# What the user has to correct is said before any cluster starts.


def set_image_to_null(rows: list[dict]) -> None:
    rows[1]["image"] = None


def ask_about_another_image(rows: list[dict]) -> None:
    rows[2]["imageId"] = "n9"


def drop(path: Path, column: str) -> None:
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def cast_to_text(path: Path, column: str) -> None:
    table = pq.read_table(path)
    i = table.schema.get_field_index(column)
    pq.write_table(table.set_column(i, column, table[column].cast(pa.string())), path)


POPE = "POPE/data/test-00000-of-00003.parquet"
GQA_QUESTIONS = "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet"
GQA_IMAGES = "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
SCIENCEQA = "ScienceQA/ScienceQA-IMG/test-00000-of-00001-f0.parquet"


@pytest.mark.parametrize(
    ("benchmark", "spoil", "says"),
    [
        ("pope", lambda f: drop(f / POPE, "category"), r"test-00000.*'pope'.*'category' must be there as string.*id,"),
        ("gqa", lambda f: drop(f / GQA_IMAGES, "image"), r"testdev_balanced_images.*'gqa'.*'image' must be there"),
        (
            "scienceqa_img",
            lambda f: cast_to_text(f / SCIENCEQA, "answer"),
            "'scienceqa_img'.*'answer' must be int64, got string",
        ),
        ("pope", lambda f: (f / POPE).unlink(), "'pope'.*POPE/data/test-.*parquet, found no such file"),
        ("pope", lambda f: (f / POPE).write_bytes(b"PAR1 not"), "test-00000-of-00003.parquet is not a readable"),
        (
            "pope",
            lambda f: rewrite(f / POPE, set_image_to_null),
            "'pope'.*'image' must hold an image in every row, got 1 missing in rows 0 to 1",
        ),
        (
            "gqa",
            lambda f: rewrite(f / GQA_QUESTIONS, ask_about_another_image),
            "'gqa', row 2.*'imageId' must name one of the 2 images.*got 'n9'",
        ),
        (
            "pope",
            lambda f: rewrite(f / POPE, lambda rows: rows.append(rows[0])),
            "'pope'.*unique.*'adversarial/1' twice",
        ),
        ("[popes]", lambda f: None, "got 'popes'; did you mean pope"),
        ("[]", lambda f: None, "at least one"),
        ("3", lambda f: None, "benchmarks must be a name or a list of names, got 3"),
        ("pope prompt.template=x", lambda f: None, "prompt.template has no meaning here"),
        ("pope limit=0", lambda f: None, "limit must be at least 1"),
        ("pope baseline.path=/nowhere", lambda f: None, "baseline.path must be the output of an evaluation"),
    ],
)
def test_mistakes_end_with_code_2_and_name_the_benchmark(
    benchmark: str, spoil: Callable[[Path], object], says: str, copy: Path, tmp_path: Path, capsys
):
    spoil(copy)
    chosen, *more = benchmark.split()
    arguments = (f"input.path={copy}", f"output.path={tmp_path / 'out'}", f"benchmarks={chosen}", *more)
    assert main([*QUIET, *arguments]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out" / "predictions").exists()


def test_an_output_of_other_questions_or_of_captions_is_refused(folder: Path, tmp_path: Path, unpruned: Path):
    def prepare(*arguments: str) -> None:
        prepare_evaluation(load_config([*QUIET, f"input.path={folder}", *arguments], EvaluateConfig, DEMO_CONFIG))

    with pytest.raises(UserError, match=r"another configuration, which differs in benchmarks .*pope"):
        prepare(f"output.path={unpruned}", "benchmarks=pope", "prune.method=none")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "part-0-0-1.parquet").touch()
    with pytest.raises(UserError, match="holds captions"):
        prepare(f"output.path={tmp_path}", "benchmarks=pope")
    with pytest.raises(UserError, match="must hold the same questions"):
        prepare(f"output.path={tmp_path / 'new'}", "benchmarks=pope", f"baseline.path={unpruned}")


def test_every_fixture_is_asked_about():
    assert len(FIXTURES) == len(PUBLISHED) + 1
    assert set(ASKED) == {bench.name for bench in (*PUBLISHED, *DEMO)}


def test_help_lists_the_keys_of_an_evaluation_alone(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  benchmarks=demo ", text, re.MULTILINE)
    assert "baseline.path" in text
    assert "prompt.template" not in text


@pytest.mark.parametrize("file", sorted((REPOSITORY / "conf").glob("evaluate_*.yaml")), ids=lambda file: file.name)
def test_every_shipped_evaluation_loads_and_opens_with_its_command(file: Path):
    config = load_config([f"--config={file}"], EvaluateConfig)
    assert config.model.path
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any("python jobs/evaluate.py" in line for line in head)
