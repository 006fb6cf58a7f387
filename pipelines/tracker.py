"""Sends a run's numbers to MLflow from a thread of the driver: a slow or dead server never holds up the job.

`NullTracker` has the five methods of `MlflowTracker` and does nothing, so that no caller asks whether tracking is on.
"""

import contextlib
import logging
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipelines.store import scheme_of
from pipelines.text import clean

logger = logging.getLogger(__name__)

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # opens as a table of runs, not of LLM traces
QUEUE_SIZE = 1000
FLUSH_SECONDS = 60.0  # longest wait at the end of a run for the calls still queued

Content = str | bytes | Mapping[str, list]
"""An artifact: a text, the bytes of a file, or a table by columns. MLflow compares the tables of several runs."""


class Tracker(Protocol):
    """Takes the numbers of a run. No method raises. Only `wait_for_id` and `finish` wait, both for a bounded time."""

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], config_yaml: str) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def artifact(self, name: str, content: Content) -> None: ...

    def wait_for_id(self, seconds: float) -> str | None: ...

    def finish(self, status: str) -> str: ...


class NullTracker:
    """Tracks nothing."""

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], config_yaml: str) -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def artifact(self, name: str, content: Content) -> None:
        pass

    def wait_for_id(self, seconds: float) -> str | None:
        return None

    def finish(self, status: str) -> str:
        return "off"


class MlflowTracker:
    """Queues every call for one worker thread. A call that fails or finds the queue full is counted and dropped.

    Args:
        artifacts: artifact location of an experiment that does not exist yet; None leaves it to the server.
        resume: id of an earlier run to continue, if that run still exists.
        times: start and end of a finished run, in Unix seconds; None takes the times of this object's own calls.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        artifacts: str | None,
        resume: str | None = None,
        times: tuple[float, float] | None = None,
    ):
        self.uri, self.experiment, self.run_name, self.artifacts = uri, experiment, run_name, artifacts
        # MLflow takes milliseconds; None lets its client take the current time.
        self._began, self._ended = (None, None) if times is None else (int(1000 * times[0]), int(1000 * times[1]))
        self.run_id: str | None = None
        self.resume = resume
        self._started = threading.Event()  # set once the server has created the run, or has failed to
        self.dropped = self.failed = 0
        self.failure = ""  # the first failure, which names the cause; later ones only follow from it
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], config_yaml: str) -> None:
        def start() -> None:
            try:
                self._start(params, tags, config_yaml)
            finally:
                self._started.set()

        self._put(start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)  # of the call: the worker thread may run it much later
        self._put(lambda: self._log(dict(metrics), step, now))

    def artifact(self, name: str, content: Content) -> None:
        self._put(lambda: self._artifact(name, content))

    def wait_for_id(self, seconds: float) -> str | None:
        """The id of the run, for runs nested in it; None if the server has not created the run within `seconds`."""
        self._started.wait(seconds)
        return self.run_id

    def finish(self, status: str) -> str:
        """Ends the run as FINISHED, FAILED or KILLED. Returns one line: where the run is, or why it is incomplete."""
        deadline = time.monotonic() + FLUSH_SECONDS  # shared by both puts and the join
        for last in (lambda: self._client.set_terminated(self._id, status, self._ended), None):  # None ends the thread
            with contextlib.suppress(queue.Full):
                self._queue.put(last, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        problems = [f"{self.uri} did not answer within {FLUSH_SECONDS:g} s"] if self._thread.is_alive() else []
        if self.failed:
            problems.append(f"{self.failed} calls failed, the first by {self.failure}")
        if self.dropped:
            problems.append(f"{self.dropped} points dropped")
        location = f"{f'run {self.run_id}' if self.run_id else 'no run'} of experiment {self.experiment} in {self.uri}"
        return f"incomplete: {'; '.join([*problems, location])}" if problems else location

    def _put(self, call: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        # The client's defaults retry a failing server for many minutes; these give up after seconds.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception as error:  # no failure of a tracking server may end the captioning
                self.failed += 1
                if self.failed == 1:
                    self.failure = f"{type(error).__name__}: {clean(str(error), 200)}"
                    logger.warning("MLflow at %s: %s; the job goes on", self.uri, self.failure)

    def _start(self, params: Mapping[str, Any], tags: Mapping[str, str], config_yaml: str) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow"):  # here, because importing mlflow resets these levels
            logging.getLogger(name).setLevel(logging.ERROR)
        self._client = MlflowClient(self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(self.experiment, self.artifacts, tags=EXPERIMENT_TAGS)
        )
        if self._resume(experiment):
            return
        source = {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "JOB"}
        run = self._client.create_run(experiment, self._began, run_name=self.run_name, tags=source | dict(tags))
        self.run_id = run.info.run_id
        entries = [Param(k, str(v)[:6000]) for k, v in params.items()]  # MLflow refuses values longer than 6000
        for i in range(0, len(entries), 100):  # and more than 100 parameters in one call
            self._client.log_batch(self._id, params=entries[i : i + 100], tags=[RunTag(k, v) for k, v in tags.items()])
        self._client.log_text(self._id, config_yaml, "config.yaml")

    def _resume(self, experiment: str) -> bool:
        """Reopens the earlier run if it still exists, and says whether. Its parameters and tags stay as they are."""
        from mlflow.exceptions import MlflowException

        if self.resume is None:
            return False
        try:
            found = self._client.get_run(self.resume).info
        except MlflowException:
            return False
        if found.experiment_id != experiment or found.lifecycle_stage != "active":
            return False
        self._client.update_run(self.resume, status="RUNNING")
        self.run_id = self.resume
        return True

    def _log(self, metrics: dict[str, float], step: int, now: int) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def _artifact(self, name: str, content: Content) -> None:
        if isinstance(content, str):
            self._client.log_text(self._id, content, name)
        elif isinstance(content, bytes):
            with tempfile.TemporaryDirectory() as folder:
                (path := Path(folder) / name).write_bytes(content)
                self._client.log_artifact(self._id, str(path))
        else:
            self._client.log_table(self._id, dict(content), name)

    @property
    def _id(self) -> str:
        if self.run_id is None:
            raise RuntimeError("the run could not be created")
        return self.run_id


def make_tracker(
    enabled: bool,
    uri: str | None,
    experiment: str,
    run_name: str,
    output: str,
    resume: str | None = None,
    times: tuple[float, float] | None = None,
) -> Tracker:
    """The tracker of a run; `NullTracker` unless `enabled`.

    Args:
        uri: tracking URI; None is that of the environment (`environment_uri`), else `default_store(output)`.
        output: path of the output that the run writes.
        resume, times: as of `MlflowTracker`.
    """
    if not enabled:
        return NullTracker()
    if uri := uri or environment_uri():
        return MlflowTracker(uri, experiment, run_name, None, resume, times)
    try:
        uri, artifacts = default_store(output)
    except OSError as error:  # no failure of tracking may end the captioning
        logger.warning("MLflow has no folder for its store: %s; the job goes on without it", error)
        return NullTracker()
    return MlflowTracker(uri, experiment, run_name, artifacts, resume, times)


def environment_uri() -> str | None:
    """The tracking URI in MLFLOW_TRACKING_URI, which managed MLflow sets; None if there is none."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def default_store(output: str) -> tuple[str, str]:
    """(tracking URI, artifact location) of the sqlite store that belongs to an output.

    The store lies beside a local output, and in the working folder for any other. Creates the folder.
    """
    folder = Path.cwd() if scheme_of(output) else Path(output).parent
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()
