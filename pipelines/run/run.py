"""Running a prepared job to its end: progress, tracking, budget, totals, and what is left beside the captions."""

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.dollars.cap import check_prices, over_budget
from pipelines.dollars.ledger import new_run, read_spent
from pipelines.dollars.meter import Meter, make_tariff
from pipelines.preflight.gate import UNPRUNED, Gate, pass_gate
from pipelines.report.page import render_report
from pipelines.run.cluster import connected
from pipelines.run.heartbeat import Heartbeat
from pipelines.run.isolate import JobFailedError, run_with_isolation
from pipelines.run.job import Job, Stages, make_stages
from pipelines.run.metrics import Account, output_totals, run_metrics
from pipelines.run.progress import Progress, Totals
from pipelines.run.tracked import start_tracker
from pipelines.stages.encode import Encoder
from pipelines.store import read_json
from pipelines.tracker import NullTracker, Tracker

logger = logging.getLogger(__name__)

RECORD, SAMPLES = "run.json", "samples.json"
DONE, FAILED, GATED, CAPPED, INTERRUPTED = 0, 1, 3, 4, 130  # exit codes


@dataclass(slots=True)
class Outcome:
    """How a run ended: exit code, why, and the numbers."""

    code: int = DONE
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tracked: str = ""
    cluster: str = ""
    gate: Gate | None = None  # with the captions that were compared


Conclude = Callable[[Job, Outcome, Totals, Tracker], dict[str, Any]]
"""(job, outcome, totals of the output, tracker) -> more for run.json. Writes what only this kind of job has."""


def run_job(
    job: Job,
    encoder: type = Encoder,
    generator: type | None = None,
    *,
    stages: Callable[[Job, type, type | None], Stages] = make_stages,
    conclude: Conclude | None = None,
) -> Outcome:
    """Captions what is left of the plan and reports; never raises for what the job itself can run into.

    An output that is complete is left as it is. Another kind of job brings its own `stages` and its own `conclude`,
    which is `report_captions` here.
    """
    stored = None if job.plan.spans else read_json(job.output, RECORD)
    if stored is not None and stored.get("finished"):
        return Outcome(message="nothing to do: the output is complete")
    started, outcome, name = time.perf_counter(), Outcome(), new_run()
    tracker: Tracker = NullTracker()
    meter = Meter(make_tariff(job.config.cost), started)
    account = Account(meter, read_spent(job.output))
    every = job.config.run.progress_seconds
    progress = Progress(job.plan.num_rows, job.plan.num_done, meter, every, started, job.counted)
    beat = Heartbeat(job, name, progress, account)
    summarized: set[str] = set()
    try:
        with interruptible():
            if not job.plan.spans:  # the last run ended with its last unit: stopped there, or before it could report
                tracker = start_tracker(job)
            elif spent := over_budget(job.config.budget.max_usd, account.earlier.usd, account):
                return Outcome(code=CAPPED, message=spent)
            else:
                with connected(job.config) as outcome.cluster, interruptible():
                    account.weigh(job.config)
                    beat.look()
                    check_prices(meter, job.config.budget.max_usd, account.earlier)
                    tracker = start_tracker(job)
                    with progress, beat:
                        if _gate_passed(job, encoder, generator, tracker, outcome, account):
                            made = stages(job, encoder, generator)
                            _caption(job, made, progress, tracker, outcome, summarized, account)
    except KeyboardInterrupt:
        outcome.code, outcome.message = INTERRUPTED, "interrupted; the same command resumes"
    except JobFailedError as error:
        outcome.code, outcome.message = FAILED, f"{error}; everything committed is kept"
    meter.stop()
    if stored is None:
        outcome.metrics = run_metrics(job, progress, account) | (outcome.gate.metrics() if outcome.gate else {})
    else:
        outcome.metrics, outcome.samples = stored["last_run"], read_json(job.output, SAMPLES) or []
    outcome.samples.sort(key=lambda sample: not sample["references"])  # images with references tell more
    _finish(job, outcome, progress, tracker, summarized, conclude or report_captions, account)
    beat.finish(outcome.code, outcome.message)
    return outcome


def _caption(
    job: Job,
    stages: Stages,
    progress: Progress,
    tracker: Tracker,
    outcome: Outcome,
    summarized: set[str],
    account: Account,
) -> None:
    summaries = run_with_isolation(
        job.plan.spans,
        lambda spans, alone: stages.run(spans, job.config, alone),
        read=stages.read,
        sink=stages.sink,
        sizes={file.source: file.size for file in job.corpus.files},
        max_isolated=job.config.faults.max_isolated,
    )
    for summary in summaries:
        summarized.add(f"part-{summary['unit']}.parquet")
        outcome.samples += summary.pop("samples")
        if progress.update(summary):
            tracker.log(run_metrics(job, progress, account), round(progress.elapsed))
        is_last = progress.num_done + progress.count >= progress.num_rows
        if not is_last and _over_budget(job, outcome, account):
            break


def _over_budget(job: Job, outcome: Outcome, account: Account) -> bool:
    """Whether the cap is reached; the outcome says so."""
    if spent := over_budget(job.config.budget.max_usd, account.usd_of_output, account):
        outcome.code, outcome.message = CAPPED, spent
    return bool(spent)


def _gate_passed(
    job: Job, encoder: type, generator: type | None, tracker: Tracker, outcome: Outcome, account: Account
) -> bool:
    """Whether the run may begin; the outcome has the gate's numbers, and says so if not."""
    if job.config.gate.min_quality is None or job.config.prune.method == UNPRUNED:
        return True
    began = time.perf_counter()
    gate = outcome.gate = pass_gate(job, encoder, generator)
    account.gate = (began, time.perf_counter())
    logger.info("gate: %s", gate)
    tracker.log(gate.metrics(), 0)
    if not gate.passed:
        outcome.code, outcome.message = GATED, f"gate failed: {gate}"
    return gate.passed and not _over_budget(job, outcome, account)


def _finish(
    job: Job,
    outcome: Outcome,
    progress: Progress,
    tracker: Tracker,
    summarized: set[str],
    conclude: Conclude,
    account: Account,
) -> None:
    totals = output_totals(job, progress, summarized)
    record = {
        "fingerprint": job.fingerprint,
        "finished": outcome.code == DONE,
        "totals": totals.to_dict(),
        "spent": account.spent().to_dict(),
        "last_run": outcome.metrics,
        "cluster": outcome.cluster,
        "config": job.config.dotted(),
        **conclude(job, outcome, totals, tracker),
    }
    tracker.log(outcome.metrics, round(progress.elapsed))
    status = {DONE: "FINISHED", CAPPED: "FINISHED", INTERRUPTED: "KILLED"}.get(outcome.code, "FAILED")
    outcome.tracked = tracker.finish(status)
    job.output.write(RECORD, json.dumps(record, indent=1).encode())


def report_captions(job: Job, outcome: Outcome, totals: Totals, tracker: Tracker) -> dict[str, Any]:
    """Writes report.html and samples.json, and tracks the report with the samples' captions."""
    report = render_report(job, outcome, totals)
    tracker.artifact("report.html", report)
    if outcome.samples:
        tracker.artifact("samples.json", _sample_table(outcome.samples))
    job.output.write("report.html", report.encode())
    job.output.write(SAMPLES, json.dumps(outcome.samples).encode())
    return {}


def _sample_table(samples: list[dict[str, Any]]) -> dict[str, list]:
    rows = [
        (s["source"], s["row"], prompt, done["caption"], " / ".join(s["references"]))
        for s in samples
        for prompt, done in zip(s["prompts"], s["captions"], strict=True)
    ]
    return {
        name: [row[i] for row in rows] for i, name in enumerate(("source", "row", "prompt", "caption", "references"))
    }


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, which clusters send, ends the block like Ctrl-C.

    Entered again once Ray is up: its own handler, installed at start-up, aborts the process.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: one that was not installed from Python
