"""Runs a prepared job to its end, with its gate, progress, tracking, spend cap and report."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from pipelines.dollars.account import Account
from pipelines.dollars.cap import check_prices, over_budget
from pipelines.dollars.ledger import new_run, read_spent
from pipelines.dollars.meter import Meter, make_tariff
from pipelines.errors import JobFailedError, UserError
from pipelines.output.lease import Lease, take_lease
from pipelines.output.patient import without_patience
from pipelines.output.reader import OutputReader
from pipelines.output.rejected import example_of, too_many_rejected
from pipelines.output.totals import Totals
from pipelines.run.cluster import connected
from pipelines.run.heartbeat import Heartbeat
from pipelines.run.isolate import run_with_isolation
from pipelines.run.job import Job
from pipelines.run.metrics import output_totals, run_metrics
from pipelines.run.outcome import (
    CAPPED,
    DONE,
    FAILED,
    GATED,
    INTERRUPTED,
    RECORD,
    SAMPLES,
    Conclude,
    Gate,
    Outcome,
    read_cluster,
)  # fmt: skip
from pipelines.run.pool_clock import PoolClock
from pipelines.run.progress import Progress
from pipelines.run.resources import is_local, stage_weights
from pipelines.run.signals import HeadWatch, head_address, interrupt_main, interruptible
from pipelines.run.stages import Stages, make_stages
from pipelines.run.tracked import start_tracker
from pipelines.secrets import without_secrets
from pipelines.store import WORLD, Store, read_json, write_json
from pipelines.text import clean
from pipelines.tracker import NullTracker, Tracker

logger = logging.getLogger(__name__)

Before = Callable[[Job], Gate | None]
"""Judges a sample on the connected cluster before the run begins; returns None if the job asks for no gate."""


def run_job(
    job: Job,
    *,
    before: Before | None = None,
    conclude: Conclude | None = None,
    stages: Callable[[Job], Stages] = make_stages,
) -> Outcome:
    """Captions the units left to do and writes the report. Failures of the job become the exit code of the outcome.

    A complete output stays as it is. An earlier run may have committed its last unit but died before its report; then
    this run writes the report.

    Args:
        before: the gate.
        conclude: writes the report of this kind of job.
        stages: makes the stages of this kind of job.

    Raises:
        UserError: if the cluster cannot be joined, or there is a spend cap and a node has no price.
        JobFailedError: if the store of the output does not answer before the run has begun.
    """
    lease = take_lease(job.output, job.config.run.heartbeat_seconds)
    try:
        record = None if job.plan.spans else read_record(job.output)
        if record is not None and record["finished"]:
            return Outcome(message="nothing to do: the output is complete")
        run = Run(job, before or (lambda job: None), conclude or (lambda *_: {}), stages, lease, record)
        account = run.account
        if job.plan.spans and (spent := over_budget(job.config.budget.max_usd, account.earlier.usd, account)):
            return Outcome(code=CAPPED, message=spent)
        return run.execute()
    finally:
        lease.release()


def read_record(output: Store) -> dict[str, Any] | None:
    """run.json of an earlier run; None if there is none, or none that a run could go on with."""
    record = read_json(output, RECORD)
    return record if isinstance(record, dict) and {"finished", "last_run"} <= record.keys() else None


class Run:
    """One run of a job with all its state: progress, account, tracker, heartbeat and outcome.

    Args:
        before, conclude, stages: as of `run_job`.
        lease: on the output. If another driver takes it over, the run ends.
        record: run.json of an earlier run that committed the last unit but did not finish its report. This run has no
            units left and reports the numbers of that run.
    """

    def __init__(
        self,
        job: Job,
        before: Before,
        conclude: Conclude,
        stages: Callable[[Job], Stages],
        lease: Lease,
        record: dict[str, Any] | None = None,
    ):
        self.job, self.before, self.conclude, self.stages, self.record = job, before, conclude, stages, record
        self.lease = lease
        config, plan = job.config, job.plan
        self.outcome = Outcome()
        self.account = Account(Meter(make_tariff(config.cost), time.perf_counter()), read_spent(job.output))
        self.progress = Progress(
            plan.num_rows, plan.num_done, self.account.meter, config.run.progress_seconds, job.counted
        )
        self.clock = PoolClock()
        self.tracker: Tracker = NullTracker()
        self.heartbeat = Heartbeat(job, new_run(), self.progress, self.account)
        self.tried: set[str] = set()  # names of the parts that this run wrote, also of rows that it tried again
        self.summarized: set[str] = set()  # names of the parts that this run added to the output
        self.new_parts = Totals()  # of these parts

    def execute(self) -> Outcome:
        """Runs the job and writes its report.

        Raises:
            UserError: as of `run_job`; nothing is reported then.
        """
        try:
            self._run()
            self.account.meter.stop()
            if self.lease.lost:  # what lies beside the captions tells of the driver that holds the output now
                self.outcome.metrics = self._metrics()
                self.tracker.finish("FAILED")
                return self.outcome
            self._report()
        except UserError:
            raise
        except Exception as error:  # of the program: it ends with its traceback, but who watches the run must know
            self._end(FAILED, _shown(error))
            self._close()
            raise
        self._close()
        return self.outcome

    def _run(self) -> None:
        """Captions what is left. What the world does to a run becomes its outcome."""
        try:
            with interruptible():
                if self.job.plan.spans:
                    self._work()
                else:  # an earlier run committed the last unit, and stopped before its report
                    self.tracker = start_tracker(self.job)
        except KeyboardInterrupt:
            if self.lease.lost:
                self._end(FAILED, f"{self.lease.lost}; everything committed is kept")
            else:
                self._end(INTERRUPTED, "interrupted; the same command resumes")
        except JobFailedError as error:
            self._end(FAILED, f"{error}; everything committed is kept")
        except (*WORLD, RayError) as error:
            self._end(FAILED, f"{_shown(error)}; everything committed is kept")

    def _close(self) -> None:
        """Ends the tracked run and the heartbeat with the state of the outcome."""
        status = {DONE: "FINISHED", CAPPED: "FINISHED", INTERRUPTED: "KILLED"}.get(self.outcome.code, "FAILED")
        self.outcome.tracked = self.tracker.finish(status)
        self.heartbeat.finish(self.outcome.code, self.outcome.message)

    def _end(self, code: int, message: str) -> None:
        self.outcome.code, self.outcome.message = code, without_secrets(message)

    def _work(self) -> None:
        """Joins the cluster, asks the gate, and captions."""
        config, checkpoint = self.job.config, self.job.checkpoint
        # Ray installs a handler of SIGTERM as it starts; the second `interruptible` replaces that handler.
        with connected(config, checkpoint) as self.outcome.cluster, interruptible():
            self.account.resource, self.account.weights = stage_weights(config, checkpoint)
            self.heartbeat.look()  # `check_prices` needs the nodes before the thread of the heartbeat starts
            check_prices(config.budget.max_usd, self.account)
            self.tracker = start_tracker(self.job)
            watched = self.lease.watched(interrupt_main)
            with self.progress, self.heartbeat, watched, HeadWatch(head_address(), self._end_process) as head:
                try:
                    if self._may_begin():
                        self._caption()
                except KeyboardInterrupt:
                    if not head.lost:
                        raise
                    raise JobFailedError(f"{head.lost}; the same command resumes") from None

    def _end_process(self, reason: str) -> None:
        """Reports the run for a main thread that is caught in a call of Ray, and ends the process, as Ray would."""
        try:
            self._end(FAILED, f"{reason}; the same command resumes; everything committed is kept")
            self._report()
            self._close()
            logger.error("failed: %s", self.outcome.message)
        finally:
            os._exit(FAILED)

    def _may_begin(self) -> bool:
        """Asks the gate and stores its verdict and its seconds. If the run may not begin, the outcome says why."""
        began = time.perf_counter()
        gate = self.outcome.gate = self.before(self.job)
        if gate is None:
            return True
        self.account.gate = (began, time.perf_counter())
        logger.info("gate: %s", gate)
        self.tracker.log(gate.metrics(), 0)
        if not gate.passed:
            self._end(GATED, f"gate failed: {gate}")
        return gate.passed and not self._is_over_budget()  # the sample of the gate costs dollars too

    def _caption(self) -> None:
        """Captions the plan, unit by unit, until it is done or the spend cap is reached."""
        job, stages = self.job, self.stages(self.job)
        if job.output.is_local and not is_local(job.config):  # workers on other machines may have another such folder
            stages.sink.witness = self.heartbeat.leave_witness()
        summaries = run_with_isolation(
            job.plan.spans,
            lambda spans, alone, sink: replace(stages, sink=sink).run(spans, job.config, alone, self.clock),
            read=stages.read,
            sink=stages.sink,
            files={file.source: file for file in job.corpus.files},
            max_isolated=job.config.faults.max_isolated,
        )
        for summary in summaries:
            if self.lease.lost:
                raise JobFailedError(self.lease.lost)
            part = f"part-{summary['unit']}.parquet"
            self.tried.add(part)
            if not summary.get("redone"):
                self.summarized.add(part)
                self.new_parts.add(summary)
            self.outcome.samples += summary.pop("samples")
            if self.progress.update(summary):
                self.tracker.log(self._metrics(), round(self.progress.elapsed))
            # A run whose last unit passes the cap is done, not capped.
            is_last = self.progress.num_done + self.progress.count >= self.progress.num_rows
            if not is_last and self._is_over_budget():
                break
            if self._are_too_many_rejected(is_last):
                break

    def _are_too_many_rejected(self, is_last: bool) -> bool:
        """Whether the run ends because most of its images are quarantined. If so, the outcome becomes FAILED."""
        job, totals = self.job, self.progress.totals
        is_done = is_last and not self.progress.num_done
        rejected = too_many_rejected(totals, job.config.faults.max_rejected, is_done=is_done)
        if rejected:
            [(reason, _)] = totals.reasons.most_common(1)
            example = example_of(OutputReader(job.output, job.folder), sorted(self.tried), reason)
            self._end(FAILED, f"{rejected}{example}. Everything committed is kept; the same command goes on")
        return bool(rejected)

    def _is_over_budget(self) -> bool:
        """Whether the spend cap is reached. If so, the outcome becomes CAPPED."""
        if spent := over_budget(self.job.config.budget.max_usd, self.account.usd_of_output, self.account):
            self._end(CAPPED, spent)
        return bool(spent)

    def _metrics(self) -> dict[str, float]:
        return run_metrics(self.job, self.progress, self.account, self.clock)

    def _report(self) -> None:
        """Writes run.json and the report of this kind of job. A run whose report cannot be written is not done."""
        outcome = self.outcome
        # A run that failed has waited enough: the store may be why it failed.
        failed = outcome.code in (FAILED, INTERRUPTED)
        output = without_patience(self.job.output) if failed else self.job.output
        job = replace(self.job, output=output)
        if self.record is None:
            outcome.metrics = self._metrics() | (outcome.gate.metrics() if outcome.gate else {})
        else:
            outcome.metrics = self.record["last_run"]
            outcome.cluster = read_cluster(self.record.get("cluster"))
        totals, more = self.new_parts, {}
        try:
            if self.record is not None:
                outcome.samples = read_json(output, SAMPLES) or []
            outcome.samples.sort(key=lambda sample: not sample["references"])  # first the images with references
            totals = output_totals(job, self.new_parts, self.summarized)
            more = self.conclude(job, outcome, totals, self.tracker)
        except (JobFailedError, *WORLD) as error:
            self._miss("the report", error)
        self.tracker.log(outcome.metrics, round(self.progress.elapsed))
        record = {
            "fingerprint": job.fingerprint,
            "finished": outcome.code == DONE,
            "message": outcome.message,
            "totals": totals.to_dict(),
            "spent": self.account.spent().to_dict(),
            "last_run": outcome.metrics,
            "cluster": outcome.cluster and outcome.cluster.to_dict(),
            "left_out": dict(job.corpus.left_out),
            "config": job.config.dotted(),
            **more,
        }
        try:
            # Written after the report, because `finished` tells the next run that the report is complete.
            write_json(output, RECORD, record)
        except (JobFailedError, *WORLD) as error:
            self._miss(RECORD, error)

    def _miss(self, what: str, error: Exception) -> None:
        """Something of the report could not be written. A run that was done has failed; others keep their message."""
        text = f"{what} could not be written: {_shown(error)}"
        if self.outcome.code == DONE:
            self._end(FAILED, f"{text}. All captions are committed; the same command writes it")
        else:
            logger.warning("%s", text)


def _shown(error: Exception) -> str:
    """An error in one line. Those of this package say all in their text."""
    text = clean(str(error))
    return text if isinstance(error, JobFailedError) else f"{type(error).__name__}: {text}"
