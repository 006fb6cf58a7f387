"""Tracking: what a run tells MLflow is all there, and a server that is down, silent or slow never costs it anything."""

import json
import logging
import os
import socket
import sys
import threading
import time

import pytest
from mlflow.tracking import MlflowClient

from pipelines import tracker as track
from pipelines.tracker import MlflowTracker, NullTracker, make_tracker

PARAMS = {"prune.retention": 0.1, "prompt.template": "x" * 8000, "input.limit": None}
PARAMS |= {f"section.key{i}": i for i in range(120)}  # more than MLflow takes in one call
SILENCE = 1.0  # seconds that a call may take: none of them waits for the network


def quickly(call, *arguments) -> None:
    start = time.monotonic()
    call(*arguments)
    assert time.monotonic() - start < SILENCE


def use(tracker) -> None:
    """What a job does, but for its end."""
    quickly(tracker.start, PARAMS, {"method": "otprune"}, "prune: {}")
    for step in range(5):
        quickly(tracker.log, {"images_per_second": 1.0}, step)
    quickly(tracker.artifact, "report.html", "<html>")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A finished run: (its client, its data, its last line, its folder)."""
    folder = tmp_path_factory.mktemp("runs")
    tracker = make_tracker(True, None, "captions", "my run", str(folder / "out"))
    tracker.start(PARAMS, {"method": "otprune", "retention": "0.1"}, "prune:\n  retention: 0.1\n")
    for step in (0, 5, 10):
        tracker.log({"images_per_second": 2.0 * step, "seconds/encode": 1}, step)
    tracker.artifact("report.html", "<html>\u00e4</html>")
    tracker.artifact("samples.json", {"source": ["a", "b"], "caption": ["one", "two"]})
    tracker.artifact("scores.bin", b"\x00\x01")
    line = tracker.finish("FINISHED")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("captions").experiment_id])
    return client, run, line, folder


def test_the_default_store_lies_beside_the_output(stored):
    _, run, line, folder = stored
    assert {"mlflow.db", "mlartifacts"} <= set(os.listdir(folder))
    assert line == f"run {run.info.run_id} of experiment captions in sqlite:///{folder}/mlflow.db"


def test_a_run_has_its_name_end_parameters_and_tags(stored):
    _, run, _, _ = stored
    assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
    assert run.data.params == {key: str(value)[:6000] for key, value in PARAMS.items()}
    assert {"method": "otprune", "retention": "0.1"}.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.source.name"] == sys.argv[0]


def test_metrics_are_kept_over_time(stored):
    client, run, _, _ = stored
    history = client.get_metric_history(run.info.run_id, "images_per_second")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.0), (5, 10.0), (10, 20.0)]
    assert abs(history[0].timestamp / 1000 - time.time()) < 3600
    assert run.data.metrics["seconds/encode"] == 1


def test_artifacts_are_kept_as_text_table_and_file(stored):
    client, run, _, _ = stored
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "report.html", "samples.json", "scores.bin"}

    def content(name: str) -> bytes:
        with open(client.download_artifacts(run.info.run_id, name), "rb") as stream:
            return stream.read()

    assert content("config.yaml") == b"prune:\n  retention: 0.1\n"
    assert content("report.html").decode() == "<html>\u00e4</html>"
    assert content("scores.bin") == b"\x00\x01"
    assert json.loads(content("samples.json")) == {
        "columns": ["source", "caption"],
        "data": [["a", "one"], ["b", "two"]],
    }


def test_a_second_run_joins_the_experiment_and_can_end_otherwise(stored):
    client, run, _, folder = stored
    tracker = make_tracker(True, None, "captions", "second", str(folder / "out"))
    tracker.start({}, {}, "")
    tracker.finish("KILLED")
    runs = client.search_runs([run.info.experiment_id])
    assert {r.info.run_name: r.info.status for r in runs} == {"my run": "FINISHED", "second": "KILLED"}


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def silent_port():
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []
        threading.Thread(target=lambda: [taken.append(server.accept()) for _ in range(9)], daemon=True).start()
        yield server.getsockname()[1]
        for connection, _ in taken:
            connection.close()


def test_a_server_that_is_down_is_noted_once_and_costs_nothing(closed_port, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "pipelines.tracker"):
        tracker = MlflowTracker(f"http://127.0.0.1:{closed_port}", "captions", "r", None)
        use(tracker)
        line = tracker.finish("FINISHED")
    assert line.startswith("incomplete: 8 calls failed, the first by MlflowException: ")
    assert line.endswith(f"; no run of experiment captions in http://127.0.0.1:{closed_port}")
    assert len(caplog.records) == 1
    assert "the job goes on" in caplog.text
    assert "Connection" in line or "Max retries" in line  # the cause, not its consequences


def test_a_server_that_never_answers_costs_a_bounded_wait_at_the_end(silent_port, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setattr(track, "FLUSH_SECONDS", 1.5)
    tracker = MlflowTracker(f"http://127.0.0.1:{silent_port}", "captions", "r", None)
    use(tracker)
    start = time.monotonic()
    assert "did not answer within 1.5 s" in tracker.finish("FINISHED")
    assert time.monotonic() - start < 1.5 + SILENCE


@pytest.fixture
def slow(monkeypatch):
    """A tracker of 5 places in its queue, whose client waits for `go` and then notes what it is told."""
    go, told = threading.Event(), []

    class Client:
        def log_batch(self, run_id, metrics):
            told.append(metrics[0].step)

        def set_terminated(self, run_id, status, end_time):
            told.append(status)

    def begin(self, *_):
        go.wait(30)
        self._client, self.run_id = Client(), "id"

    monkeypatch.setattr(track, "QUEUE_SIZE", 5)
    monkeypatch.setattr(MlflowTracker, "_start", begin)
    return MlflowTracker("http://slow", "captions", "r", None), go, told


def fill(tracker) -> None:
    """20 points, once the worker has begun to wait."""
    tracker.start({}, {}, "")
    while not tracker._queue.empty():
        time.sleep(0.01)
    for step in range(20):
        quickly(tracker.log, {"x": 1.0}, step)


def test_what_a_full_queue_cannot_take_is_dropped_and_counted(slow):
    tracker, go, told = slow
    fill(tracker)
    assert tracker.dropped == 15
    go.set()
    assert tracker.finish("FINISHED") == "incomplete: 15 points dropped; run id of experiment captions in http://slow"
    assert told == [0, 1, 2, 3, 4, "FINISHED"]


def test_a_queue_that_stays_full_does_not_hold_up_the_end(slow, monkeypatch):
    tracker, go, _ = slow
    monkeypatch.setattr(track, "FLUSH_SECONDS", 0.5)
    fill(tracker)
    start = time.monotonic()
    assert "incomplete: http://slow did not answer within 0.5 s" in tracker.finish("FINISHED")
    assert time.monotonic() - start < 0.5 + SILENCE
    go.set()


def test_one_failed_call_does_not_hide_the_run(slow, monkeypatch):
    tracker, go, told = slow
    log = tracker._log
    monkeypatch.setattr(tracker, "_log", lambda m, step, now: log(m, step, now) if step else 1 / 0)
    tracker.start({}, {}, "")
    go.set()
    for step in range(3):
        tracker.log({"x": 1.0}, step)
    line = tracker.finish("FINISHED")
    assert line == (
        "incomplete: 1 calls failed, the first by ZeroDivisionError: division by zero; "
        "run id of experiment captions in http://slow"
    )
    assert told == [1, 2, "FINISHED"]


def test_without_tracking_nothing_happens(tmp_path):
    tracker = make_tracker(False, None, "captions", "r", str(tmp_path / "out"))
    assert isinstance(tracker, NullTracker)
    use(tracker)
    assert tracker.finish("FINISHED") == "off"
    assert os.listdir(tmp_path) == []


def test_an_output_on_s3_is_tracked_in_the_working_folder_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MlflowTracker, "_work", lambda self: None)
    assert make_tracker(True, None, "e", "r", "s3://bucket/out").uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert make_tracker(True, "http://server", "e", "r", "s3://bucket/out").uri == "http://server"


def test_the_server_of_the_environment_is_taken_unless_another_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(MlflowTracker, "_work", lambda self: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://managed")
    assert make_tracker(True, None, "e", "r", str(tmp_path / "out")).uri == "http://managed"
    assert make_tracker(True, "http://server", "e", "r", str(tmp_path / "out")).uri == "http://server"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert make_tracker(True, None, "e", "r", str(tmp_path / "out")).uri == f"sqlite:///{tmp_path}/mlflow.db"
