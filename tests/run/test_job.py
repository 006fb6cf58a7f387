"""The caption job from its command line to what it leaves behind, with the demo model and an embedded Ray."""

import contextlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption_corpus import main
from jobs.verify import main as verify
from pipelines.output.parts import METADATA_KEY
from pipelines.output.schema import REASONS
from tests.helpers import DEMO, LOCAL, QUICK, addresses, captions_of, read_rows, run_fake, write_corpus
from tests.hostile import LIMITS, write_hostile_folder

# Columns and types that readers of an output rely on.
CAPTION_COLUMNS = {
    "id": "string",
    "source": "string",
    "row": "int64",
    "caption": "string",
    "prompt": "string",
    "model": "string",
    "method": "string",
    "num_visual_tokens": "int32",
    "num_kept_tokens": "int32",
    "num_prompt_tokens": "int32",
    "num_generated_tokens": "int32",
    "finish_reason": "string",
    "sha256": "string",
    "num_attempts": "int32",
}
QUARANTINE_COLUMNS = {
    name: "int64" if name == "row" else "string"
    for name in ("id", "source", "row", "sha256", "stage", "reason", "detail")
}


@dataclass
class Run:
    """A finished run of the command line."""

    code: int
    text: str  # stdout
    arguments: list[str]
    output: Path


def run(*arguments: str) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        code = main(list(arguments))
    output = next(a.partition("=")[2] for a in arguments if a.startswith("output.path="))
    return Run(code, stream.getvalue(), list(arguments), Path(output))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, scene_png) -> Path:
    """Two files with 18 rows: 15 fine, one null, one that is text, one whose template column is null."""
    folder = tmp_path_factory.mktemp("corpus")
    images: list[bytes | None] = [scene_png(i) for i in range(12)]
    images[3], images[8] = None, b"this is no image"
    hints = [None if i == 5 else f"a {i}" for i in range(12)]
    references = [[f"reference {i}"] for i in range(12)]
    write_corpus(folder / "a.parquet", images, rows_per_group=5, hint=hints, references=references)
    more = [scene_png(i) for i in range(12, 18)]
    write_corpus(folder / "b.parquet", more, hint=["b"] * 6, references=[["reference"]] * 6)
    return folder


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Run:
    """Every kind of thing in one run: two prompts, one with a column; rejects; samples; tracking; dollars."""
    return run(
        *DEMO,
        f"input.path={corpus}",
        f"output.path={tmp_path_factory.mktemp('done') / 'out'}",
        "prompt.more=['caption this image {hint} .']",
        "unit.images=4",
        "run.samples=3",
        "run.progress_seconds=0.1",
        "cost.usd_per_hour=3.6",
    )


def test_the_run_succeeds_and_says_so(done: Run):
    assert done.code == 0, done.text
    assert "15 captioned and 3 quarantined" in done.text
    assert f"{done.output}/captions/*.parquet" in done.text
    assert "images/s" in done.text
    assert "per million images" in done.text


def test_captions_have_exactly_the_promised_columns(done: Run):
    for path in (done.output / "captions").iterdir():
        assert {f.name: str(f.type) for f in pq.read_schema(path)} == CAPTION_COLUMNS
    for path in (done.output / "quarantine").iterdir():
        assert {f.name: str(f.type) for f in pq.read_schema(path)} == QUARANTINE_COLUMNS


def test_every_row_is_captioned_or_quarantined_once_for_each_prompt(done: Run, corpus: Path, capsys):
    captioned = [(r["source"], r["row"]) for r in read_rows(done.output)]
    rejected = {(r["source"], r["row"]): r["reason"] for r in read_rows(done.output, "quarantine")}
    assert rejected == {
        ("a.parquet", 3): "missing",
        ("a.parquet", 5): "prompt",
        ("a.parquet", 8): "unsupported_format",
    }
    everything = {("a.parquet", i) for i in range(12)} | {("b.parquet", i) for i in range(6)}
    assert sorted(captioned) == sorted(2 * list(everything - rejected.keys()))
    assert verify([f"input.path={corpus}", f"output.path={done.output}"]) == 0
    assert "15 images, 30 captions" in capsys.readouterr().out


def test_caption_rows_say_how_they_were_made(done: Run, demo_model: Path):
    rows = read_rows(done.output)
    for row in rows:
        assert row["id"] == f"row-{row['row']}"
        assert row["caption"]
        assert row["prompt"] in ("describe the image .", f"caption this image {_hint(row)} .")
        assert row["model"] == str(demo_model)
        assert row["method"] == "otprune"
        assert row["num_visual_tokens"] == 256
        assert row["num_kept_tokens"] == round(0.098 * 256)
        assert row["num_prompt_tokens"] > row["num_kept_tokens"]
        assert 0 < row["num_generated_tokens"] <= 48
        assert row["finish_reason"] in ("stop", "length")
        assert len(row["sha256"]) == 64
    assert len({row["caption"] for row in rows}) > 5, "captions depend on the image"


def _hint(row: dict) -> str:
    return f"a {row['row']}" if row["source"] == "a.parquet" else "b"


def test_quarantine_rows_carry_a_reason_of_the_closed_list_and_its_stage(done: Run):
    for row in read_rows(done.output, "quarantine"):
        assert row["stage"] == REASONS[row["reason"]]
        assert row["id"] == f"row-{row['row']}"
        assert (row["sha256"] is None) == (row["reason"] == "missing")


def test_objects_know_their_unit_fingerprint_and_seconds(done: Run):
    fingerprint = json.loads((done.output / "run.json").read_text())["fingerprint"]
    for path in (done.output / "captions").iterdir():
        stored = json.loads(pq.read_metadata(path).metadata[METADATA_KEY])
        assert path.name == f"part-{stored['unit']}.parquet"
        assert stored["fingerprint"] == fingerprint
        assert set(stored["seconds"]) == {"read", "decode", "encode", "generate"}, "of its own writing it cannot know"


def test_run_json_holds_fingerprint_config_and_totals(done: Run):
    record = json.loads((done.output / "run.json").read_text())
    assert record["finished"] is True
    assert record["totals"]["images_captioned"] == 15
    assert record["totals"]["images_quarantined"] == 3
    assert record["totals"]["captions"] == 30
    assert record["totals"]["reasons"] == {"missing": 1, "prompt": 1, "unsupported_format": 1}
    assert record["totals"]["generated_tokens"] == sum(r["num_generated_tokens"] for r in read_rows(done.output))
    assert record["config"]["prune.retention"] == 0.098
    claim = json.loads((done.output / "fingerprint.json").read_text())
    assert claim["prune.retention"] == 0.098
    assert claim["model.weights"]


def test_the_report_stands_alone_and_shows_images_and_captions(done: Run):
    page = (done.output / "report.html").read_text()
    assert "15 images captioned" in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert "unsupported_format" in page
    shown = [row["caption"] for row in read_rows(done.output) if row["caption"] in page]
    assert shown


def test_mlflow_holds_the_run_under_the_promised_names(done: Run, corpus: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{done.output.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("captions")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    params, metrics, tags = tracked.data.params, tracked.data.metrics, tracked.data.tags
    assert params["prune.retention"] == "0.098"
    assert params["input.path"] == str(corpus)
    assert params["unit.images"] == "4"
    assert metrics["images_captioned"] == 15
    assert metrics["images_quarantined"] == 3
    assert metrics["quarantined/missing"] == 1
    assert metrics["images_per_second"] > 0
    assert metrics["tokens_per_second"] > 0
    assert metrics["mean_caption_tokens"] > 1
    assert math.isclose(metrics["usd_total"], 3.6 * metrics["wall_seconds"] / 3600, rel_tol=0.05)
    assert math.isclose(metrics["usd_per_image"], metrics["usd_total"] / 15, rel_tol=1e-6)
    assert math.isclose(metrics["usd_per_million_images"], 1e6 * metrics["usd_per_image"], rel_tol=1e-6)
    for stage in ("read", "decode", "encode", "generate", "write"):
        assert metrics[f"seconds/{stage}"] > 0
    assert tags["method"] == "otprune"
    assert tags["retention"] == "0.098"
    assert tags["engine"] == "transformers"
    assert tags["model"] == params["model.path"]
    assert tags["cluster"] == "local"
    assert len(client.get_metric_history(tracked.info.run_id, "images_captioned")) > 1, "metrics over time"
    artifacts = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id)}
    assert artifacts == {"config.yaml", "report.html", "samples.json"}
    table = json.loads((Path(tracked.info.artifact_uri.removeprefix("file://")) / "samples.json").read_text())
    assert table["columns"] == ["source", "row", "prompt", "caption", "references"]
    assert len(table["data"]) == 6, "three images under two prompts"


def times_of(output: Path) -> dict[Path, int]:
    """When each file of the output was written, without the lease that every driver takes."""
    files = (path for path in output.rglob("*") if path.is_file() and path.parent.name != "driver")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_finished_job_does_nothing_when_started_again(done: Run):
    before = times_of(done.output)
    again = run(*done.arguments)
    assert again.code == 0
    assert "nothing to do" in again.text
    assert times_of(done.output) == before


def test_another_configuration_on_the_same_output_is_refused(done: Run, capsys):
    before = times_of(done.output)
    assert run(*done.arguments, "prune.retention=0.5").code == 2
    error = capsys.readouterr().err
    assert "prune.retention (0.098 there, 0.5 here)" in error
    assert "output.on_mismatch=new" in error
    assert times_of(done.output) == before


@pytest.fixture(scope="module")
def sibling(done: Run) -> Path:
    """The output of the same command at full retention, which had to go elsewhere."""
    changed = (LOCAL, "prune.retention=1.0", "output.on_mismatch=new", "mlflow.enabled=false", "run.samples=0")
    again = run(*done.arguments, *changed)
    assert again.code == 0
    (folder,) = set(done.output.parent.glob("out-*"))
    assert str(folder) in again.text
    return folder


def test_on_mismatch_new_writes_a_whole_sibling_folder(done: Run, sibling: Path):
    assert {p.name for p in sibling.iterdir()} == {p.name for p in done.output.iterdir()}
    assert addresses(sibling) == addresses(done.output)
    assert {row["num_kept_tokens"] for row in read_rows(sibling)} == {256}


def test_keeping_every_token_captions_as_without_pruning(done: Run, sibling: Path, tmp_path: Path):
    plain = run(
        *done.arguments, LOCAL, "prune.method=none", f"output.path={tmp_path}", "mlflow.enabled=false", "run.samples=0"
    )
    assert plain.code == 0
    assert captions_of(tmp_path) == captions_of(sibling)
    assert captions_of(tmp_path) != captions_of(done.output)


def test_a_limited_run_is_completed_without_doubles(tmp_path: Path, corpus: Path):
    arguments = (f"input.path={corpus}", f"output.path={tmp_path}")
    assert run_fake(*arguments, "unit.images=4", "input.limit=7").code == 0
    assert addresses(tmp_path) == [("a.parquet", row) for row in range(7)]
    assert run_fake(*arguments, "unit.images=3", "input.limit=14").code == 0
    assert run_fake(*arguments, "unit.images=5").code == 0
    assert addresses(tmp_path) == [("a.parquet", row) for row in range(12)] + [("b.parquet", row) for row in range(6)]
    assert verify([f"input.path={corpus}", f"output.path={tmp_path}"]) == 0


def test_a_folder_of_image_files_is_captioned_limited_and_completed(tmp_path: Path, scene_png):
    for i in range(11):
        path = tmp_path / "in" / f"{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene_png(i))
    (tmp_path / "in" / "0" / "notes.txt").write_text("no image")
    arguments = (f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}", "unit.images=4")
    assert run_fake(*arguments, "input.limit=6").code == 0
    assert len(addresses(tmp_path / "out")) == 6
    assert run_fake(*arguments).code == 0
    sources = sorted(str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*.png"))
    assert addresses(tmp_path / "out") == [(source, 0) for source in sources]
    assert {row["id"] for row in read_rows(tmp_path / "out")} == set(sources)
    assert verify(list(arguments)) == 0


def test_every_hostile_file_is_captioned_or_quarantined_for_its_reason(tmp_path: Path):
    expected = write_hostile_folder(tmp_path / "in")
    limits = [f"decode.{name}={value}" for name, value in LIMITS.items()]
    arguments = (f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}", "unit.images=16", *limits)
    assert run(*QUICK, LOCAL, *arguments).code == 0
    found = {row["source"]: "ok" for row in read_rows(tmp_path / "out")}
    found |= {row["source"]: row["reason"] for row in read_rows(tmp_path / "out", "quarantine")}
    assert found == expected
    assert verify(list(arguments)) == 0


def test_an_img2dataset_file_is_captioned_with_its_failed_downloads_quarantined(tmp_path: Path, scene_png):
    """Bytes under `jpg`, null where the download failed, `key`, `url`, and status columns around them."""
    failed = {1, 4, 5}
    table = pa.table(
        {
            "url": [f"http://images.invalid/{i}.jpg" for i in range(8)],
            "key": [f"{i:09d}" for i in range(8)],
            "status": ["failed_to_download" if i in failed else "success" for i in range(8)],
            "error_message": [None] * 8,
            "width": [None if i in failed else 224 for i in range(8)],
            "jpg": [None if i in failed else scene_png(i) for i in range(8)],
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "00000.parquet")
    assert run_fake(f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}").code == 0
    rejected = read_rows(tmp_path / "out", "quarantine")
    assert {(row["row"], row["reason"]) for row in rejected} == {(row, "missing") for row in failed}
    assert {row["id"] for row in rejected} == {f"{row:09d}" for row in failed}
    assert [row["row"] for row in read_rows(tmp_path / "out")] == [0, 2, 3, 6, 7]


@pytest.mark.slow
def test_methods_of_every_kind_run_through_the_job(tmp_path: Path, corpus: Path):
    """Inside the model with every token kept: as unpruned; by the prompt: each prompt's own tokens; merged: -1 kept."""
    arguments = (*QUICK, LOCAL, f"input.path={corpus / 'b.parquet'}", "prompt.more=['is there a circle ?']")
    settings = {
        "none": (),
        "fastv": ("prune.settings.layer=1", "prune.settings.kept=256"),
        "cdpruner": ("prune.settings.relevance=words",),
        "prumerge": ("prune.settings.adaptive=true", "run.samples=2"),
    }
    for method, own in settings.items():
        assert run(*arguments, f"output.path={tmp_path / method}", f"prune.method={method}", *own).code == 0
        assert len(read_rows(tmp_path / method)) == 12
    assert captions_of(tmp_path / "fastv") == captions_of(tmp_path / "none")
    assert {row["num_kept_tokens"] for row in read_rows(tmp_path / "cdpruner")} == {25}
    assert len({row["num_kept_tokens"] for row in read_rows(tmp_path / "prumerge")}) > 1
    claim = json.loads((tmp_path / "fastv" / "fingerprint.json").read_text())
    assert claim["prune.resolved"] == {"layer": 1, "kept": 256}
