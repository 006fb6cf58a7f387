"""Runs a prepared job to its end, with its gate, progress, tracking, spend cap and report."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.dollars.account import Account
from pipelines.dollars.cap import check_prices, over_budget
from pipelines.dollars.ledger import new_run, read_spent
from pipelines.dollars.meter import Meter, make_tariff
from pipelines.errors import JobFailedError
from pipelines.output.lease import Lease, take_lease
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
from pipelines.run.resources import stage_weights
from pipelines.run.signals import interrupt_main, interruptible
from pipelines.run.stages import Stages, make_stages
from pipelines.run.tracked import start_tracker
from pipelines.store import read_json
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
    """
    lease = take_lease(job.output, job.config.run.heartbeat_seconds)
    try:
        record = None if job.plan.spans else read_json(job.output, RECORD)
        if record is not None and record.get("finished"):
            return Outcome(message="nothing to do: the output is complete")
        run = Run(job, before or (lambda job: None), conclude or (lambda *_: {}), stages, lease, record)
        account = run.account
        if job.plan.spans and (spent := over_budget(job.config.budget.max_usd, account.earlier.usd, account)):
            return Outcome(code=CAPPED, message=spent)
        return run.execute()
    finally:
        lease.release()


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
        self.summarized: set[str] = set()  # names of the parts that this run added to the output
        self.new_parts = Totals()  # of these parts

    def execute(self) -> Outcome:
        """Runs the job and writes its report.

        Raises:
            UserError: as of `run_job`; nothing is reported then.
        """
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
        self.account.meter.stop()
        if self.lease.lost:  # what lies beside the captions tells of the driver that holds the output now
            self.outcome.metrics = self._metrics()
            self.tracker.finish("FAILED")
            return self.outcome
        self._report()
        self.heartbeat.finish(self.outcome.code, self.outcome.message)
        return self.outcome

    def _end(self, code: int, message: str) -> None:
        self.outcome.code, self.outcome.message = code, message

    def _work(self) -> None:
        """Joins the cluster, asks the gate, and captions."""
        config, checkpoint = self.job.config, self.job.checkpoint
        # Ray installs a handler of SIGTERM as it starts; the second `interruptible` replaces that handler.
        with connected(config, checkpoint) as self.outcome.cluster, interruptible():
            self.account.resource, self.account.weights = stage_weights(config, checkpoint)
            self.heartbeat.look()  # `check_prices` needs the nodes before the thread of the heartbeat starts
            check_prices(config.budget.max_usd, self.account)
            self.tracker = start_tracker(self.job)
            with self.lease.watched(interrupt_main), self.progress, self.heartbeat:
                if self._may_begin():
                    self._caption()

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
            if not summary.get("redone"):
                self.summarized.add(f"part-{summary['unit']}.parquet")
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
            example = example_of(OutputReader(job.output, job.folder), sorted(self.summarized), reason)
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
        """Writes run.json and the report of this kind of job, and ends the tracked run."""
        job, outcome = self.job, self.outcome
        if self.record is None:
            outcome.metrics = self._metrics() | (outcome.gate.metrics() if outcome.gate else {})
        else:
            outcome.metrics, outcome.samples = self.record["last_run"], read_json(job.output, SAMPLES) or []
            outcome.cluster = read_cluster(self.record.get("cluster"))
        outcome.samples.sort(key=lambda sample: not sample["references"])  # first the images with references
        totals = output_totals(job, self.new_parts, self.summarized)
        record = {
            "fingerprint": job.fingerprint,
            "finished": outcome.code == DONE,
            "totals": totals.to_dict(),
            "spent": self.account.spent().to_dict(),
            "last_run": outcome.metrics,
            "cluster": outcome.cluster and outcome.cluster.to_dict(),
            "left_out": dict(job.corpus.left_out),
            "config": job.config.dotted(),
            **self.conclude(job, outcome, totals, self.tracker),
        }
        self.tracker.log(outcome.metrics, round(self.progress.elapsed))
        status = {DONE: "FINISHED", CAPPED: "FINISHED", INTERRUPTED: "KILLED"}.get(outcome.code, "FAILED")
        outcome.tracked = self.tracker.finish(status)
        # Written last, because `finished` tells the next run that the report is complete.
        job.output.write(RECORD, json.dumps(record, indent=1).encode())
