"""Runs a sweep: one caption job after the other, with a record for each. Finished points are skipped.

Points on the connected cluster share one Ray session, so each of them pays only for the start of its actors. Points on
other clusters are submitted there. The unpruned point of each group runs first, because the quality of the other points
is measured against it. A point that fails leaves its reason in its record, and the sweep goes on.
"""

import contextlib
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.config.load import with_values
from pipelines.dollars.ledger import read_spent
from pipelines.errors import UserError
from pipelines.run.cluster import connected
from pipelines.run.outcome import CAPPED, DONE, FAILED, INTERRUPTED, Cluster
from pipelines.run.resources import actor_cpus
from pipelines.run.signals import interruptible
from pipelines.store import STORE_ERRORS, Store, read_json, write_json
from pipelines.sweep.advice import Advice, advise_sweep, headline_metrics
from pipelines.sweep.checked import Sweep
from pipelines.sweep.grid import POINTS, Point
from pipelines.sweep.judge import Judge
from pipelines.sweep.page import render_sweep
from pipelines.sweep.point import (
    FINISHED,
    Record,
    failed_record,
    finished_record,
    price_again,
    read_record,
    run_here,
    store_of,
    unpruned_of,
    write_record,
)  # fmt: skip
from pipelines.sweep.submit import run_there
from pipelines.sweep.tracker import SweepTracker
from pipelines.text import clean

logger = logging.getLogger(__name__)

FILE = "sweep.json"


@dataclass(slots=True)
class SweepOutcome:
    """The end of a sweep: its exit code, and the records by the name of their point."""

    code: int = DONE
    message: str = ""
    records: dict[str, Record] = field(default_factory=dict)
    skipped: int = 0
    tracked: str = ""
    advice: Advice | None = None


def run_sweep(sweep: Sweep) -> SweepOutcome:
    """Runs the points that are not finished, and writes the report after each of them.

    Raises:
        UserError: if the connected cluster cannot be joined.
    """
    outcome = SweepOutcome(records={point.name: record for point in sweep.points if (record := read_record(point))})
    done = [name for name, record in outcome.records.items() if record["status"] == FINISHED]
    outcome.skipped = len(done)
    todo = [point for point in sweep.points if point.name not in done]
    earlier = read_json(sweep.output, FILE) or {}
    tracker = SweepTracker(sweep.config, sweep.output.path, earlier.get("mlflow_run"))
    logger.info("%d points, %d of them finished before", len(sweep.points), len(done))
    judge, session = Judge(sweep.config), Session(sweep)
    for point in sweep.points:
        if point.name in done:
            outcome.records[point.name] = price_again(point, outcome.records[point.name])
    _judge_again(sweep, outcome, judge)
    try:
        with interruptible(), session:
            if any(point.address is None for point in todo):
                session.join()
            if todo or tracker.lacks(outcome.records.values()):
                tracker.start(len(sweep.points))
                _report(sweep, outcome, judge, tracker)
            for number, point in enumerate(todo, 1):
                logger.info("point %d of %d: %s", number, len(todo), point.name)
                record = _run_point(sweep, point, session, judge, outcome)
                if record is None:
                    break
                write_record(point, record)
                outcome.records[point.name] = record
                if point.is_unpruned:  # points that ran before it can now be compared with it
                    _judge_again(sweep, outcome, judge)
                tracker.point(point, record)
                _report(sweep, outcome, judge, tracker)
    except KeyboardInterrupt:
        outcome.code, outcome.message = INTERRUPTED, "interrupted; the same command resumes"
    _conclude(sweep, outcome, judge, tracker)
    return outcome


class Session(contextlib.AbstractContextManager):
    """The Ray session that the points of the connected cluster share.

    `join` connects when the first point needs Ray, and again after `leave`, which the sweep calls after a failure.
    """

    def __init__(self, sweep: Sweep):
        here = [(point.config, point.checkpoint) for point in sweep.points if point.address is None]
        # An embedded Ray is as large as the largest pools need.
        self._pools = max(here, key=lambda pools: actor_cpus(*pools), default=(sweep.config, None))
        self._stack = contextlib.ExitStack()
        self.cluster: Cluster | None = None

    def join(self) -> None:
        if self.cluster is None:
            self.cluster = self._stack.enter_context(connected(*self._pools))
            self._stack.enter_context(interruptible())  # again: Ray replaces the signal handler as it starts

    def leave(self) -> None:
        self._stack.close()
        self.cluster = None

    def __exit__(self, *_: object) -> None:
        self.leave()


def _run_point(sweep: Sweep, point: Point, session: Session, judge: Judge, outcome: SweepOutcome) -> Record | None:
    """The record of the point. None if the sweep must stop; then `outcome` has the code and the message."""
    cap = sweep.config.budget.max_usd
    if cap is not None:
        others = _spent_on_others(sweep, point)
        if others >= cap:
            outcome.code = CAPPED
            outcome.message = f"stopped at budget.max_usd={cap:g}: ${others:.4f} spent; a higher cap resumes"
            return None
        # The cap is for the whole sweep, while the job counts only the dollars of its own output.
        point = replace(point, config=with_values(point.config, {"budget.max_usd": cap - others}))
    try:
        if point.address is None:
            session.join()
    except UserError as error:
        outcome.code, outcome.message = FAILED, f"the cluster is not reachable: {error}; the same command resumes"
        return None
    try:
        if point.address is None:
            ran = run_here(point, sweep.actors)
        else:
            ran = run_there(point, sweep.config.sweep.poll_seconds)
        if ran.code == INTERRUPTED:
            raise KeyboardInterrupt
        if ran.code == CAPPED:
            outcome.code, outcome.message = CAPPED, ran.message
            return None
        if ran.code != DONE:
            session.leave()  # the failure may have broken Ray: the next point gets a fresh session
            return _failed(point, ran.message)
        record = finished_record(point, judge.measure(store_of(point), _unpruned_store(sweep, point, outcome)))
        return record | {"ran_on": session.cluster.to_dict()} if point.address is None and session.cluster else record
    except UserError as error:  # includes UnreachableError of another cluster
        return _failed(point, str(error))
    except Exception as error:  # no point may end the sweep
        logger.debug("%s", point.name, exc_info=True)
        session.leave()
        return _failed(point, f"{type(error).__name__}: {clean(str(error))}")


def _spent_on_others(sweep: Sweep, point: Point) -> float:
    """Dollars spent on all other points under points/, including points of earlier grids."""
    own, root = store_of(point).path, f"{sweep.output.path}/{POINTS}"
    others = (replace(sweep.output, path=f"{root}/{name}") for name in sweep.output.folders(POINTS))
    return sum(read_spent(other).usd for other in others if other.path != own)


def _judge_again(sweep: Sweep, outcome: SweepOutcome, judge: Judge) -> None:
    """Measures a finished point again if its quality was measured with other settings or without an unpruned point."""
    for point in sweep.points:
        record = outcome.records.get(point.name)
        if record is None or record["status"] != FINISHED:
            continue
        unpruned, quality = _unpruned_store(sweep, point, outcome), record["quality"]
        if quality.get("judged") == judge.settings and (quality["relative"] is not None or unpruned is None):
            continue
        try:
            record["quality"] = judge.measure(store_of(point), unpruned)
        except (UserError, *STORE_ERRORS) as error:
            logger.warning("%s keeps its earlier quality: %s", point.name, clean(str(error)))
            continue
        record["tracked_before"] = record.pop("tracked", None)
        write_record(point, record)


def _failed(point: Point, reason: str) -> Record:
    logger.warning("%s failed: %s; the sweep goes on", point.name, reason)
    return failed_record(point, reason)


def _unpruned_store(sweep: Sweep, point: Point, outcome: SweepOutcome) -> Store | None:
    if point.is_unpruned:
        return store_of(point)
    unpruned = unpruned_of(point, sweep.points, outcome.records)
    return None if unpruned is None else store_of(unpruned)


def _report(sweep: Sweep, outcome: SweepOutcome, judge: Judge, tracker: SweepTracker) -> str:
    """Writes sweep.json and report.html for the current records; returns the page."""
    page = render_sweep(sweep, outcome.records, judge)
    record: dict[str, Any] = {
        "grid": sweep.config.sweep.grid,
        "points": list(outcome.records.values()),
        "left": [point.name for point in sweep.points if point.name not in outcome.records],
        "mlflow_run": tracker.run_id,
    }
    write_json(sweep.output, FILE, record)
    sweep.output.write("report.html", page.encode())
    return page


def _conclude(sweep: Sweep, outcome: SweepOutcome, judge: Judge, tracker: SweepTracker) -> None:
    counts = Counter(record["status"] for record in outcome.records.values())
    if outcome.code == DONE and counts[FINISHED] < len(sweep.points):
        failed = [record for record in outcome.records.values() if record["status"] != FINISHED]
        outcome.code = FAILED
        outcome.message = (
            f"{len(failed)} of {len(sweep.points)} points failed; reason of the first: {failed[0]['reason']}; "
            "the same command tries them again"
        )
    page = _report(sweep, outcome, judge, tracker)
    outcome.advice = advise_sweep(sweep, outcome.records, judge)
    pairs = [(point, outcome.records[point.name]) for point in sweep.points if point.name in outcome.records]
    status = {DONE: "FINISHED", CAPPED: "FINISHED", INTERRUPTED: "KILLED"}.get(outcome.code, "FAILED")
    metrics = {"points_finished": counts[FINISHED], "points_failed": counts.total() - counts[FINISHED]}
    if outcome.skipped == len(sweep.points) and not tracker.lacks(outcome.records.values()):
        outcome.message, outcome.tracked = "nothing to do: every point is finished", tracker.run_id or "off"
        return
    metrics |= headline_metrics(outcome.advice)
    artifacts = {"report.html": page, FILE: sweep.output.read(FILE).decode()}
    outcome.tracked = tracker.finish(pairs, metrics, artifacts, status)
    # Again: `finish` adds the ids of child runs to the records, and may have created the parent run.
    _report(sweep, outcome, judge, tracker)
