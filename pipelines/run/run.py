"""Running a prepared job to its end: progress, tracking, budget, totals, and what is left beside the captions."""

import json
import logging
import time
from collections.abc import Callable

from pipelines.dollars.cap import check_prices, over_budget
from pipelines.dollars.ledger import new_run, read_spent
from pipelines.dollars.meter import Meter, make_tariff
from pipelines.errors import JobFailedError
from pipelines.preflight.gate import UNPRUNED, pass_gate
from pipelines.report.write import report_captions
from pipelines.run.cluster import connected
from pipelines.run.heartbeat import Heartbeat
from pipelines.run.isolate import run_with_isolation
from pipelines.run.job import Job
from pipelines.run.metrics import Account, output_totals, run_metrics
from pipelines.run.outcome import CAPPED, DONE, FAILED, GATED, INTERRUPTED, RECORD, SAMPLES, Conclude, Outcome
from pipelines.run.progress import Progress
from pipelines.run.signals import interruptible
from pipelines.run.stages import Stages, make_stages
from pipelines.run.tracked import start_tracker
from pipelines.stages.encode import Encoder
from pipelines.store import read_json
from pipelines.tracker import NullTracker, Tracker

logger = logging.getLogger(__name__)


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
                with connected(job.config, job.checkpoint) as outcome.cluster, interruptible():
                    account.weigh(job.config, job.checkpoint)
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
