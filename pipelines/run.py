"""Running a prepared job to its end: progress, tracking, budget, totals, and what is left beside the captions."""

import json
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.caption import Job, Stages, make_stages
from pipelines.cluster import connected
from pipelines.cost import Meter, make_tariff
from pipelines.encode import Encoder
from pipelines.faults import JobFailedError, run_with_isolation
from pipelines.generate import Generator
from pipelines.heartbeat import Heartbeat
from pipelines.ledger import new_run, read_spent
from pipelines.measures import Account, output_totals, run_metrics
from pipelines.progress import Progress, Totals
from pipelines.report import render_report
from pipelines.settings import UserError, to_yaml
from pipelines.track import NullTracker, Tracker, make_tracker

logger = logging.getLogger(__name__)

RECORD = "run.json"
PRICE_ADVICE = "set cost.usd_per_hour for the whole cluster, or price them by cost.prices and node labels"
DONE, FAILED, CAPPED, INTERRUPTED = 0, 1, 4, 130  # exit codes


@dataclass(slots=True)
class Outcome:
    """How a run ended: exit code, why, and the numbers."""

    code: int = DONE
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tracked: str = ""
    cluster: str = ""


Conclude = Callable[[Job, Outcome, Totals, Tracker], dict[str, Any]]
"""(job, outcome, totals of the output, tracker) -> more for run.json. Writes what only this kind of job has."""


def run_job(
    job: Job,
    encoder: type = Encoder,
    generator: type = Generator,
    *,
    stages: Callable[[Job, type, type], Stages] = make_stages,
    conclude: Conclude | None = None,
) -> Outcome:
    """Captions what is left of the plan and reports; never raises for what the job itself can run into.

    An output that is complete is left as it is. Another kind of job brings its own `stages` and its own `conclude`,
    which is `report_captions` here.
    """
    if not job.plan.spans and job.output.exists(RECORD):
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
        with _interruptible():
            if not job.plan.spans:  # the last run ended after its last unit and before it could report
                tracker = _start_tracker(job)
            elif not _capped(job, account, outcome):
                with connected(job.config) as outcome.cluster, _interruptible(), progress, beat:
                    account.weigh(job.config)
                    _check_budget(job, meter)
                    tracker = _start_tracker(job)
                    _caption(job, stages(job, encoder, generator), progress, tracker, outcome, summarized, account)
    except KeyboardInterrupt:
        outcome.code, outcome.message = INTERRUPTED, "interrupted; the same command resumes"
    except JobFailedError as error:
        outcome.code, outcome.message = FAILED, f"{error}; everything committed is kept"
    meter.stop()
    outcome.metrics = run_metrics(job, progress, account)
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
        if _capped(job, account, outcome):
            break


def _capped(job: Job, account: Account, outcome: Outcome) -> bool:
    """Whether the runs of this output have cost what they may; the outcome then says so."""
    cap, usd = job.config.budget.max_usd, account.usd_of_output
    if cap is None:
        return False
    if unpriced := account.meter.unpriced:  # one that joined later
        outcome.code, outcome.message = CAPPED, f"stopped: budget.max_usd cannot be kept, as {_listed(unpriced)}"
        return True
    if (usd or account.earlier.usd) < cap:
        return False
    of = f", ${account.earlier.usd:.4f} of it by {account.earlier.runs} earlier runs" if account.earlier.usd else ""
    outcome.code = CAPPED
    outcome.message = (
        f"stopped at budget.max_usd={cap:g}: ${usd or account.earlier.usd:.4f} spent on this output{of}; "
        "the same command with a higher cap resumes"
    )
    return True


def _check_budget(job: Job, meter: Meter) -> None:
    """Says which nodes have no price.

    Raises:
        UserError: if there is a cap and one of them has none.
    """
    if not meter.unpriced:
        return
    if job.config.budget.max_usd is not None:
        raise UserError(f"budget.max_usd needs the price of every node: {_listed(meter.unpriced)}; {PRICE_ADVICE}")
    logger.warning("not in the dollars: %s; %s", _listed(meter.unpriced), PRICE_ADVICE)


def _listed(unpriced: Counter[str]) -> str:
    return "; ".join(f"{count} node{'s' * (count > 1)}: {problem}" for problem, count in unpriced.items())


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
    """Writes report.html, and tracks it with the samples."""
    report = render_report(job, outcome, totals)
    tracker.artifact("report.html", report)
    if outcome.samples:
        tracker.artifact("samples.json", _sample_table(outcome.samples))
    job.output.write("report.html", report.encode())
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


def _start_tracker(job: Job) -> Tracker:
    config = job.config
    name = config.mlflow.run_name or f"{config.prune.method}-{config.prune.retention:g}-{job.fingerprint[:8]}"
    tracker = make_tracker(
        config.mlflow.enabled, config.mlflow.tracking_uri, config.mlflow.experiment, name, job.output.path
    )
    tags = {
        "method": config.prune.method,
        "retention": f"{config.prune.retention:g}",
        "engine": config.engine.name,
        "model": config.model.path,
        "cluster": config.ray.address or "local",
        "fingerprint": job.fingerprint,
    }
    tracker.start(config.dotted(), tags | job.tags | git_tag(), to_yaml(config))
    return tracker


def git_tag() -> dict[str, str]:
    """{"git_commit": ...} where the package runs from a repository."""
    import subprocess

    from pipelines.settings import REPOSITORY

    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"git_commit": done.stdout.strip()} if done.returncode == 0 else {}


@contextmanager
def _interruptible() -> Iterator[None]:
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
