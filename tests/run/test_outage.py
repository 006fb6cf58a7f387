"""A store of the output that is out of order: it is waited for, within bounds, and no image is to blame."""

import errno
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pipelines.corpus.patience
from pipelines.run.outcome import Outcome
from pipelines.store import Store
from tests.failing import Refuses, empty_store, failing_store
from tests.helpers import addresses, captions_of, run_fake, write_corpus

OUTPUT = Store("memory://outage/out")
FULL = OSError(errno.ENOSPC, "No space left on device")
EXPIRED = PermissionError("ExpiredToken")
ALL = [("a.parquet", row) for row in range(8)]


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipelines.corpus.patience, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(pipelines.corpus.patience, "LONGEST_WAIT", 0.02)
    empty_store()
    yield
    empty_store()


@pytest.fixture
def caption(tmp_path: Path, scene_png: Callable[[int], bytes]) -> Callable[..., Outcome]:
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i) for i in range(8)])
    common = [f"input.path={corpus}", f"output.path={OUTPUT.path}", "unit.images=2", "faults.patience_seconds=0.3"]
    return lambda *arguments: run_fake(*common, *arguments)


def from_the(n: int, verb: str, part: str, error: Exception, times: int = 10**9) -> Refuses:
    """Refuses the `n`-th such call (from 0 on) and `times` - 1 that follow it."""
    calls = itertools.count()
    return lambda did, path: error if did == verb and part in path and n <= next(calls) < n + times else None


def stored(name: str) -> dict:
    return json.loads(OUTPUT.read(name))


@pytest.mark.parametrize(
    ("verb", "part", "error"),
    [
        ("PUT", "captions/", FULL),
        ("PUT", "captions/", TimeoutError()),
        ("PUT", "run.json", EXPIRED),
        ("PUT", "report.html", ConnectionResetError()),
        ("LIST", "/captions", EXPIRED),
    ],
)
def test_an_outage_of_the_output_that_ends_costs_time_alone(caption, caplog, verb, part, error):
    first = {"captions/": 1, "/captions": 2}.get(part, 0)  # opening the output, which does not wait, lists it twice
    with failing_store(from_the(first, verb, part, error, times=3)):
        outcome = caption("run.heartbeat_seconds=60")
    assert (outcome.code, outcome.message) == (0, "")
    assert addresses(OUTPUT) == ALL
    assert stored("run.json")["finished"]
    waits = [text for text in caplog.messages if "waiting since" in text]
    assert len(waits) == 1


@pytest.mark.parametrize("error", [FULL, EXPIRED])
def test_a_sink_that_is_refused_for_good_ends_the_run_and_everything_is_told(caption, caplog, error):
    with caplog.at_level(logging.WARNING), failing_store(from_the(2, "PUT", "captions/", error)):
        outcome = caption()
    assert outcome.code == 1
    detail = "OSError: No space left on device" if error is FULL else "PermissionError"
    assert f"outage: output.path {OUTPUT.path}: {detail}, for 0.3 s; the same command resumes" in outcome.message
    waits = [text for text in caplog.messages if "waiting since" in text]
    assert len(waits) == 1
    assert re.search(r"waiting since \d\d:\d\d:\d\d until \d\d:\d\d:\d\d UTC", waits[0])
    assert addresses(OUTPUT) == ALL[:4]  # what was committed stays
    assert OUTPUT.list("quarantine") == {}
    assert stored("run.json")["finished"] is False
    assert stored("run.json")["message"] == stored("heartbeat.json")["message"] == outcome.message
    assert stored("heartbeat.json")["state"] == "failed"
    assert caption().code == 0
    assert len(captions_of(OUTPUT)) == 8


def test_a_list_that_is_refused_after_the_last_unit_ends_the_run_with_a_message(caption):
    after_plan = from_the(0, "LIST", "/captions", EXPIRED)
    begun: list[str] = []

    def refuses(verb: str, path: str) -> Exception | None:
        begun.extend([path] * (verb == "PUT" and "captions/" in path))
        return after_plan(verb, path) if begun else None

    with failing_store(refuses):
        outcome = caption()
    assert outcome.code == 1
    said = f"the report could not be written: output.path {OUTPUT.path}: PermissionError, for 0.3 s"
    assert outcome.message.startswith(said)
    assert addresses(OUTPUT) == ALL
    assert stored("heartbeat.json")["state"] == "failed"


@pytest.mark.parametrize("name", ["run.json", "report.html", "samples.json"])
def test_a_report_that_cannot_be_written_leaves_the_run_undone(caption, name):
    with failing_store(from_the(0, "PUT", name, FULL)):
        outcome = caption()
    assert outcome.code == 1
    assert "could not be written: output.path" in outcome.message
    assert "All captions are committed; the same command writes it" in outcome.message
    assert stored("heartbeat.json")["state"] == "failed"
    assert caption().code == 0
    assert stored("run.json")["finished"]
    assert addresses(OUTPUT) == ALL


def test_without_patience_nothing_is_waited_for(caption, caplog):
    with failing_store(from_the(0, "PUT", "captions/", EXPIRED, times=1)):
        assert caption("faults.patience_seconds=0").code == 1
    assert not [text for text in caplog.messages if "waiting" in text]


def test_a_mistake_of_the_program_keeps_its_traceback_and_is_told(caption):
    with failing_store(from_the(0, "LIST", "/captions", TypeError("no store says so"))), pytest.raises(TypeError):
        caption()
    with failing_store(from_the(0, "PUT", "report.html", TypeError("a bug"))), pytest.raises(TypeError):
        caption()
    assert stored("heartbeat.json")["state"] == "failed"
