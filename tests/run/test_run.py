"""One run: the cap in mid-run, an output that was done but not reported, and what is handed in."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.caption_corpus import main
from pipelines.config.load import load_config
from pipelines.dollars.ledger import record_run
from pipelines.output import lease
from pipelines.report.terminal import print_summary
from pipelines.run.job import Actors, Job, prepare
from pipelines.run.outcome import Gate
from pipelines.run.run import run_job
from pipelines.store import Store
from tests.helpers import LOCAL, QUICK, addresses, fake_encoder, fake_generator, run_fake, write_corpus

DOLLAR_A_SECOND = "cost.usd_per_hour=3600"
HOLD = """
import sys
from pipelines.output.lease import take_lease
from pipelines.store import Store
take_lease(Store(sys.argv[1]))
print("held", flush=True)
input()
"""
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@pytest.fixture
def corpus(tmp_path: Path, scene_png: Callable[[int], bytes]) -> Path:
    return write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i) for i in range(8)])


def test_the_cap_in_mid_run_counts_the_earlier_runs(corpus, tmp_path):
    """Earlier runs spent 1000 dollars; this one would need minutes to reach the cap by itself."""
    out = tmp_path / "out"
    record_run(Store(str(out)), "20260101T000000-old", 1000.0, 100.0, {})
    arguments = [f"input.path={corpus}", f"output.path={out}", "unit.images=1", DOLLAR_A_SECOND]
    outcome = run_fake(*arguments, "budget.max_usd=1000.3", encoder=fake_encoder(seconds=0.1))
    assert outcome.code == 4
    assert "$1000.0000 of it by 1 earlier runs; a higher cap resumes" in outcome.message
    assert 0 < len(addresses(out)) < 8
    assert outcome.metrics["usd_of_output"] == pytest.approx(1000 + outcome.metrics["usd_total"])
    heartbeat = json.loads((out / "heartbeat.json").read_text())
    assert heartbeat["state"] == "capped"
    assert json.loads((out / "run.json").read_text())["spent"]["usd"] == pytest.approx(heartbeat["usd_of_output"])


def test_an_output_that_has_spent_its_cap_is_left_as_it_is(corpus, tmp_path):
    out = tmp_path / "out"
    record_run(Store(str(out)), "20260101T000000-old", 1000.0, 100.0, {})
    outcome = run_fake(f"input.path={corpus}", f"output.path={out}", DOLLAR_A_SECOND, "budget.max_usd=1000")
    assert outcome.code == 4
    assert not (out / "run.json").exists()
    assert not (out / "heartbeat.json").exists()


def test_a_gate_that_spends_the_cap_leaves_nothing_to_caption_with(corpus, tmp_path):
    def slow_gate(job: Job) -> Gate:
        time.sleep(0.5)
        return Gate(True, 0.5, 1.0, (1.0, 1.0), "cider", 1.0, 1.0, images=8, drawn=8, seconds=0.5)

    paths = (f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "unit.images=1")
    config = load_config([*QUICK, LOCAL, *paths, DOLLAR_A_SECOND, "budget.max_usd=0.4"])
    outcome = run_job(prepare(config, Actors(fake_encoder(), fake_generator())), before=slow_gate)
    assert outcome.code == 4
    assert addresses(tmp_path / "out") == []
    assert 0.5 <= outcome.metrics["usd/gate"] <= outcome.metrics["usd_total"]


def test_without_a_gate_and_a_report_a_job_writes_captions_and_its_record_alone(corpus, tmp_path):
    arguments = [*QUICK, LOCAL, f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "gate.min_quality=0.99"]
    outcome = run_job(prepare(load_config(arguments), Actors(fake_encoder(), fake_generator())))
    assert (outcome.code, outcome.gate) == (0, None)
    assert len(addresses(tmp_path / "out")) == 8
    assert (tmp_path / "out" / "run.json").exists()
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("record", [None, "", "[1]", '{"finished": false}'])
def test_a_run_that_finds_its_last_unit_done_and_no_record_ends_with_a_summary(corpus, tmp_path, capsys, record):
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "cost.usd_per_hour=1"]
    assert run_fake(*arguments).code == 0
    file = tmp_path / "out" / "run.json"
    file.unlink()
    if record is not None:
        file.write_text(record)
    job = prepare(load_config([*QUICK, LOCAL, *arguments]), Actors(fake_encoder(), fake_generator()))
    outcome = run_job(job)
    print_summary(job, outcome)
    assert outcome.code == 0
    assert "8 of 8 rows were done before this run" in capsys.readouterr().out
    assert json.loads(file.read_text())["totals"]["images_captioned"] == 8


def test_a_run_that_only_reports_keeps_the_cluster_of_the_run_that_captioned(corpus, tmp_path):
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}"]
    assert run_fake(*arguments).code == 0
    file = tmp_path / "out" / "run.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"finished": False}))
    assert run_fake(*arguments).code == 0
    assert json.loads(file.read_text())["cluster"] == before["cluster"]
    file.write_text(json.dumps(before | {"finished": False, "cluster": "embedded Ray: 4 CPUs, 0 GPUs"}))
    assert run_fake(*arguments).code == 0, "a record may hold a text there"


def test_a_second_driver_is_refused_and_changes_nothing(corpus, tmp_path, capsys):
    """Exit code 2 and one line, whatever the second driver was to do: go on, try again, or caption anew."""
    out = tmp_path / "out"
    paths = [f"input.path={corpus}", f"output.path={out}"]
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], **PIPES) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        files = {path: path.read_bytes() for path in out.rglob("*.json")}
        for arguments in ([], ["faults.redo=[fetch]"], ["prune.retention=0.3"]):
            assert main([*QUICK, LOCAL, *paths, *arguments]) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert error.startswith(f"error: output.path {out} is being written by another driver, process {other.pid}")
        assert {path: path.read_bytes() for path in out.rglob("*.json")} == files
        other.communicate("\n")
    assert run_fake(*paths).code == 0


def test_a_driver_whose_output_was_taken_stops_and_keeps_what_it_committed(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    out = Store(str(tmp_path / "out"))

    class Taken(fake_encoder()):
        def __call__(self, row):
            if len(out.list("captions")) == 2:
                mine = json.loads(out.read("driver/000001.json"))
                out.write("driver/000002.json", json.dumps(mine | {"owner": "another", "host": "there"}).encode())
                time.sleep(60)  # until it is interrupted: it need not end its unit
            return super().__call__(row)

    arguments = (f"input.path={corpus}", f"output.path={out.path}", "unit.images=1", "run.heartbeat_seconds=0.1")
    outcome = run_fake(*arguments, encoder=Taken)
    assert outcome.code == 1
    assert "was taken over by another driver" in outcome.message
    assert len(addresses(out)) == 2
    assert not out.exists("run.json")
    assert json.loads(out.read("heartbeat.json"))["state"] == "running"  # the other's, whoever wrote it last
