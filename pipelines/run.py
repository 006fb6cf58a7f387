"""Running a prepared job to its end: progress, tracking, budget, totals, and what is left beside the captions."""

import copy
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from otprune.flops import prefill_flops
from otprune.shapes import LanguageShape
from pipelines.budget import layer_rows, num_patches
from pipelines.caption import Job, Stages, make_stages
from pipelines.cluster import connected
from pipelines.encode import Encoder
from pipelines.faults import JobFailedError, run_with_isolation
from pipelines.generate import Generator
from pipelines.progress import Progress, Totals
from pipelines.report import render_report
from pipelines.settings import to_yaml
from pipelines.sink import read_totals
from pipelines.track import NullTracker, Tracker, make_tracker

logger = logging.getLogger(__name__)

RECORD = "run.json"
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
    started, outcome = time.perf_counter(), Outcome()
    tracker: Tracker = NullTracker()
    price = job.config.cost.usd_per_hour
    every = job.config.run.progress_seconds
    progress = Progress(job.plan.num_rows, job.plan.num_done, price, every, started, job.counted)
    summarized: set[str] = set()
    try:
        with _interruptible():
            if job.plan.spans:
                with connected(job.config) as outcome.cluster, _interruptible(), progress:
                    tracker = _start_tracker(job)
                    _caption(job, stages(job, encoder, generator), progress, tracker, outcome, summarized)
            else:  # the last run ended after its last unit and before it could report
                tracker = _start_tracker(job)
    except KeyboardInterrupt:
        outcome.code, outcome.message = INTERRUPTED, "interrupted; the same command resumes"
    except JobFailedError as error:
        outcome.code, outcome.message = FAILED, f"{error}; everything committed is kept"
    outcome.metrics = run_metrics(job, progress)
    outcome.samples.sort(key=lambda sample: not sample["references"])  # images with references tell more
    _finish(job, outcome, progress, tracker, summarized, conclude or report_captions)
    return outcome


def _caption(
    job: Job,
    stages: Stages,
    progress: Progress,
    tracker: Tracker,
    outcome: Outcome,
    summarized: set[str],
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
            tracker.log(run_metrics(job, progress), round(progress.elapsed))
        cap = job.config.budget.max_usd
        if cap is not None and progress.usd is not None and progress.usd >= cap:
            outcome.code = CAPPED
            outcome.message = f"stopped at budget.max_usd={cap:g}: ${progress.usd:.4f} spent; the same command resumes"
            break


def run_metrics(job: Job, progress: Progress) -> dict[str, float]:
    """The metrics of this run so far, under their MLflow names. Rates include nothing of the start-up.

    `gpu_busy/<stage>` is the share of the run in which the stage's actors were at work, CPU actors too;
    `prefill_tflops_per_image` counts multiply-adds of the language model, as papers on pruning do.
    """
    totals, usd = progress.totals, progress.usd
    actors = {"encode": job.config.encode.actors, "generate": job.config.generate.actors}
    metrics: dict[str, float] = {
        **progress.rates(),
        "images_captioned": totals.images_captioned,
        "images_quarantined": totals.images_quarantined,
        "mean_caption_tokens": totals.generated_tokens / max(1, totals.captions),
        "mean_prompt_tokens": totals.prompt_tokens / max(1, totals.captions),
        "prefill_tflops_per_image": prefill_tflops(job, totals),
        "finished_by_length": totals.finished_by_length / max(1, totals.captions),
        "wall_seconds": progress.elapsed,
        **{f"seconds/{stage}": seconds for stage, seconds in totals.seconds.items()},
        **{f"gpu_busy/{stage}": totals.seconds[stage] / (n * progress.elapsed) for stage, n in actors.items()},
        **{f"quarantined/{reason}": count for reason, count in totals.reasons.items()},
    }
    if usd is not None:
        per_image = usd / max(1, totals.images_captioned)
        metrics |= {"usd_total": usd, "usd_per_image": per_image, "usd_per_million_images": per_image * 1e6}
    return metrics


def prefill_tflops(job: Job, totals: Totals) -> float:
    """Multiply-adds / 1e12 of the language model on one image: on its prompts, or on one question of a benchmark."""
    shape = LanguageShape.from_config(AutoConfig.from_pretrained(job.model).text_config)
    mean_prompt, num_visual = round(totals.prompt_tokens / max(1, totals.captions)), num_patches(job.model)
    rows = layer_rows(job.config.prune.method, job.pruning, num_visual, shape.layers)
    text = mean_prompt if rows is None else max(mean_prompt - num_visual, 0)
    return (1 + len(job.config.prompt.more)) * prefill_flops(shape, text, visual=rows) / 1e12


def output_totals(job: Job, progress: Progress, summarized: set[str]) -> Totals:
    """Sums over everything the output holds: this run's own, and the metadata of objects committed before."""
    before = [name for name in job.output.list(job.folder) if name not in summarized]
    totals = copy.deepcopy(progress.totals)
    with ThreadPoolExecutor(16) as pool:
        for unit in pool.map(lambda name: read_totals(job.output, name, job.folder), before):
            totals.add(unit)
    return totals


def _finish(
    job: Job, outcome: Outcome, progress: Progress, tracker: Tracker, summarized: set[str], conclude: Conclude
) -> None:
    totals = output_totals(job, progress, summarized)
    record = {
        "fingerprint": job.fingerprint,
        "finished": outcome.code == DONE,
        "totals": totals.to_dict(),
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
