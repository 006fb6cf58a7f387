"""Tracks a sweep in MLflow: a parent run for the sweep, and a child run for each point, written when the point ends.

If the server is down, the sweep waits for it once and goes on. The records keep everything, so the missing child runs
are written at the end, or by the next run of the same sweep.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipelines.config.load import to_yaml
from pipelines.run.tracked import git_tag
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.grid import Point
from pipelines.sweep.point import Record, store_of, write_record
from pipelines.tracker import Content, MlflowTracker, Tracker, make_tracker

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
START_SECONDS = 60.0  # longest wait for the parent run; includes creating a SQLite store

Pair = tuple[Point, Record]


class SweepTracker:
    """`run_id` is the id of the parent run; `problem` is the first failure, which `finish` reports."""

    def __init__(self, config: SweepConfig, output: str, resume: str | None):
        self.config, self.output, self.problem, self.run_id = config, output, "", resume
        self._parent: Tracker | None = None

    @property
    def is_on(self) -> bool:
        return self.config.mlflow.enabled

    def lacks(self, records: Iterable[Record]) -> bool:
        """Whether a record has no child run yet."""
        return self.is_on and any(not record.get("tracked") for record in records)

    def start(self, num_points: int) -> None:
        """Creates the parent run, or continues the parent run of an earlier run of this sweep."""
        self._parent = self._tracker(self.config.mlflow.run_name or "sweep", self.run_id)
        tags = {"kind": "sweep", "points": str(num_points), "model": self.config.model.path} | git_tag()
        self._parent.start(self.config.dotted(), tags, to_yaml(self.config))
        if isinstance(self._parent, MlflowTracker):
            run_id = self._parent.wait_for_id(START_SECONDS)
            if run_id is None:
                self.problem = self._parent.failure or f"{self._parent.uri} does not answer"
            self.run_id = run_id or self.run_id

    def point(self, point: Point, record: Record) -> None:
        """Writes the child run of a point, and its id into the record. Does nothing while the server is down."""
        if not self.is_on or self.problem or self.run_id is None or record.get("tracked"):
            return
        ended, seconds = record.get("ended"), (record.get("metrics") or {}).get("wall_seconds", 0.0)
        # The child run gets the times at which the point ran, not those at which it is written.
        times = None if ended is None else (ended - seconds, ended)
        tracker = self._tracker(point.name.removesuffix(f"-{point.key}"), record.pop("tracked_before", None), times)
        cluster = point.address or point.config.ray.address or "local"
        tags = {
            "method": point.config.prune.method,
            "retention": f"{point.config.prune.share:g}",
            "engine": point.config.engine.name,
            "model": point.config.model.path,
            "cluster": cluster,
            "point": point.name,
            PARENT_TAG: self.run_id,
        }
        axes = {f"axis.{axis}": value for axis, value in point.values.items()}
        params = axes | point.config.dotted()
        del params["output.path"]  # differs in every point: MLflow would list it first in comparisons
        tracker.start(params, tags, to_yaml(point.config))
        tracker.log(point_metrics(record), 0)
        if record["reason"]:
            tracker.artifact("reason.txt", record["reason"])
        if (page := store_of(point)).exists("report.html"):
            tracker.artifact("report.html", page.read("report.html").decode())
        ending = tracker.finish("FINISHED" if record["status"] == "finished" else "FAILED")
        if ending.startswith("incomplete"):
            self.problem = ending
            logger.warning("MLflow: %s; the sweep goes on and writes its runs later", ending)
        elif isinstance(tracker, MlflowTracker):
            record["tracked"] = tracker.run_id
            write_record(point, record)

    def finish(
        self, pairs: Iterable[Pair], metrics: Mapping[str, float], artifacts: Mapping[str, Content], status: str
    ) -> str:
        """Writes the missing child runs and ends the parent run. Returns one line: where it is, or what is missing."""
        if not self.is_on:
            return "off"
        pairs = [pair for pair in pairs if not pair[1].get("tracked")]
        if self.problem:  # try once more: the server may be up again
            self.problem = ""
            self._retry(lambda: self.start(len(pairs)))
        for point, record in pairs:
            self.point(point, record)
        left = sum(not record.get("tracked") for _, record in pairs)
        if self.problem or self._parent is None:
            return f"incomplete: {left} points are not in MLflow ({self.problem}); the same command writes them"
        self._parent.log(metrics, 0)
        for name, content in artifacts.items():
            self._parent.artifact(name, content)
        return self._parent.finish(status)

    def _retry(self, start: Callable[[], None]) -> None:
        if self._parent is not None:
            self._parent.finish("KILLED")
        start()

    def _tracker(self, name: str, resume: str | None, times: tuple[float, float] | None = None) -> Tracker:
        options = self.config.mlflow
        return make_tracker(options.enabled, options.tracking_uri, options.experiment, name, self.output, resume, times)


def point_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a point by MLflow name. Quality is `accuracy/<against>/<metric>`, also with `_low` and `_high`."""
    quality = record.get("quality") or {}
    metrics = dict(record.get("metrics") or {})
    metrics |= {f"health/{name}": value for name, value in (quality.get("health") or {}).items()}
    measured = {
        "references": quality.get("references") or {},
        "unpruned": (quality.get("agreement") or {}) | ({"relative": r} if (r := quality.get("relative")) else {}),
    }
    for against, values in measured.items():
        for name, ends in values.items():
            keys = (f"accuracy/{against}/{name}", f"accuracy/{against}/{name}_low", f"accuracy/{against}/{name}_high")
            metrics |= dict(zip(keys, ends, strict=True))
    return metrics
