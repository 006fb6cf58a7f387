"""What a user can get wrong ends in one clear line and exit code 2, quickly, with nothing written."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption_corpus import main
from tests.helpers import QUICK, REPOSITORY, addresses, fake_encoder, free_port, run_fake, s3_server


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, scene_parquet: Callable[..., Path]) -> Path:
    return scene_parquet(tmp_path_factory.mktemp("corpus") / "scenes.parquet", 12, row_group_size=4)


@pytest.fixture
def refused(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs the job, asserts how it is refused, and returns the line that says why."""

    def run(*arguments: str) -> str:
        output = [] if any(a.startswith("output.path=") for a in arguments) else [f"output.path={tmp_path / 'out'}"]
        started = time.monotonic()
        code = main([*QUICK, f"input.path={corpus}", *output, *arguments])
        assert time.monotonic() - started < 30
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert not (tmp_path / "out").exists(), "nothing is written"
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("prune.retentoin=0.5", "unknown key prune.retentoin; did you mean prune.retention?"),
        ("prune.retention=0", "prune.retention must be above 0 and at most 1, got 0"),
        ("prune.retention=much", "prune.retention must be a number above 0 and at most 1, or null, got 'much'"),
        ("unit.images=1.5", "unit.images must be a whole number of at least 1 and at most 4096, got 1.5"),
        ("prune.method=otprun", "prune.method must be one of none, "),
        ("prune.gamma_scale=huge", "prune.gamma_scale"),
        ("output.on_mismatch=mix", "output.on_mismatch"),
        ("engine.name=tgi", "engine.name"),
        ("generate", "arguments must be --config FILE or dotted.key=value, got 'generate'"),
        ("--config=nowhere.yaml", "--config must name a YAML file, found none at nowhere.yaml"),
        ("model.path=", "model.path must be set"),
        ("output.path=", "output.path must be set"),
        ("input.path=", "input.path must be set"),
        ("input.format=zip", "input.format must be one of auto, parquet, images, tar, imagefolder, arrow, jsonl, csv"),
        ("input.format=images", "input.path must hold image files, found 1 others"),
        ("prompt.template=a {caption", "prompt.template must have matching braces"),
        ("prompt.template=about {scen}", "prompt.template uses the column 'scen'; the corpus has id, image"),
    ],
)
def test_a_bad_configuration_names_its_key(refused, argument: str, words: str):
    assert words in refused(argument)


def test_a_missing_input_is_named(refused, tmp_path: Path):
    assert str(tmp_path / "nowhere") in refused(f"input.path={tmp_path / 'nowhere'}")
    assert "nothing at" in refused(f"input.path={tmp_path}/*.parquet")


def test_an_empty_input_is_named(refused, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "found nothing at" in refused(f"input.path={tmp_path / 'empty'}")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty" / "a.parquet")
    assert "found 1 Parquet files without rows" in refused(f"input.path={tmp_path / 'empty'}")


def test_an_input_without_images_is_named(refused, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("x")
    expected = "must hold Parquet, image, tar, metadata, Arrow, JSONL or CSV files, found 1 others"
    assert expected in refused(f"input.path={tmp_path / 'in'}")
    (tmp_path / "in" / "bad.parquet").write_bytes(b"PAR1 this is none")
    assert "bad.parquet is not a readable Parquet file" in refused(f"input.path={tmp_path / 'in'}")


def test_a_corpus_without_an_image_column_lists_its_columns(refused, tmp_path: Path):
    pq.write_table(pa.table({"number": [1], "text": ["a"]}), tmp_path / "a.parquet")
    path = f"input.path={tmp_path / 'a.parquet'}"
    assert "no image column found among [number: int64, text: string]" in refused(path)
    assert "must be a column of the corpus (number, text), got picture" in refused(path, "input.image_column=picture")
    assert "got number of type int64" in refused(path, "input.image_column=number")


def test_an_output_that_cannot_be_written_is_named(refused, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert f"output.path {tmp_path / 'file' / 'out'} must be writable" in refused(f"output.path={tmp_path}/file/out")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("there") as address:
        yield address


def test_a_bucket_that_does_not_exist_is_named(refused, s3: str):
    at = f"output.endpoint_url={s3}"
    assert "output.path s3://absent/out must be writable" in refused("output.path=s3://absent/out", at)
    at = f"input.endpoint_url={s3}"
    assert "s3://absent/in" in refused("input.path=s3://absent/in", at)
    assert "s3://there/in" in refused("input.path=s3://there/in", at)


@pytest.mark.slow  # boto3 tries again for half a minute
def test_a_store_that_nobody_serves_is_named(refused):
    at = f"output.endpoint_url=http://127.0.0.1:{free_port()}"
    assert "output.path s3://there/out must be writable" in refused("output.path=s3://there/out", at)
    at = at.replace("output", "input")
    assert "input.path s3://there/in cannot be listed" in refused("input.path=s3://there/in", at)


def test_a_model_path_without_a_model_is_named(refused, tmp_path: Path, demo_model: Path):
    (tmp_path / "model").mkdir()
    path = f"model.path={tmp_path / 'model'}"
    assert "found none in" in refused(path)
    (tmp_path / "model" / "config.json").write_text("{ not json")
    assert "config.json must be JSON" in refused(path)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "got model_type 'bert'" in refused(path)
    shutil.copy(demo_model / "config.json", tmp_path / "model")
    assert "must hold *.safetensors weights, found none" in refused(path)
    assert "must be a folder or a hub repository" in refused(f"model.path={tmp_path / 'nowhere'}")
    assert "is neither a folder here" in refused("model.path=nobody/no-such-model")


@pytest.mark.slow
def test_no_cluster_at_the_address_is_said_quickly(tmp_path: Path, corpus: Path):
    """In a process of its own, as this one has a Ray; so this shows the real exit code as well."""
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", f"ray.address=127.0.0.1:{free_port()}"]
    done = subprocess.run(
        [sys.executable, "jobs/caption_corpus.py", *QUICK, *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "ray.address must name a running cluster, got 127.0.0.1:" in line
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out" / "captions").exists()
    assert not (tmp_path / "out" / "run.json").exists()


def test_the_spend_cap_stops_the_job_with_code_4_and_it_can_be_resumed(tmp_path: Path, corpus: Path, capsys):
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "unit.images=1"]
    capped = ["cost.usd_per_hour=1000", "budget.max_usd=0.0001"]
    outcome = run_fake(*arguments, *capped, encoder=fake_encoder(seconds=0.1))
    assert outcome.code == 4
    assert "stopped at budget.max_usd=0.0001" in outcome.message
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] is False
    done = addresses(tmp_path / "out")
    assert 0 < len(done) < 12
    assert run_fake(*arguments).code == 0
    assert addresses(tmp_path / "out") == [("scenes.parquet", row) for row in range(12)]


def test_a_cap_that_is_reached_with_the_last_unit_stops_nothing(tmp_path: Path, corpus: Path):
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "unit.images=12"]
    outcome = run_fake(*arguments, "cost.usd_per_hour=1000", "budget.max_usd=0.0001")
    assert (outcome.code, outcome.message) == (0, "")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_an_output_that_was_stopped_at_its_last_unit_is_finished_by_the_same_command(tmp_path: Path, corpus: Path):
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}"]
    assert run_fake(*arguments).code == 0
    file = tmp_path / "out" / "run.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"finished": False}))
    assert run_fake(*arguments).code == 0
    after = json.loads(file.read_text())
    assert after["finished"]
    assert after["last_run"] == before["last_run"]
    assert run_fake(*arguments).message == "nothing to do: the output is complete"


@pytest.mark.slow
def test_a_dead_tracking_server_does_not_stop_the_job(tmp_path: Path, corpus: Path):
    dead = f"mlflow.tracking_uri=http://127.0.0.1:{free_port()}"
    outcome = run_fake(f"input.path={corpus}", f"output.path={tmp_path}", "mlflow.enabled=true", dead)
    assert outcome.code == 0
    assert outcome.tracked.startswith("incomplete: ")
    assert len(addresses(tmp_path)) == 12


def test_a_silent_tracking_server_does_not_slow_the_job(tmp_path: Path, corpus: Path, monkeypatch):
    """A server that accepts connections and never answers."""
    monkeypatch.setattr("pipelines.tracker.FLUSH_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"mlflow.tracking_uri=http://127.0.0.1:{silent.getsockname()[1]}"
        outcome = run_fake(f"input.path={corpus}", f"output.path={tmp_path}", "mlflow.enabled=true", address)
    assert outcome.code == 0
    assert "did not answer within 1 s" in outcome.tracked
    assert len(addresses(tmp_path)) == 12
