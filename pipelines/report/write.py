"""Writes the report of a caption job: report.html and samples.json in the output, and both in MLflow."""

from typing import Any

from pipelines.output.totals import Totals
from pipelines.report.page import render_report
from pipelines.run.job import Job
from pipelines.run.outcome import SAMPLES, Outcome
from pipelines.store import write_json
from pipelines.tracker import Tracker


def report_captions(job: Job, outcome: Outcome, totals: Totals, tracker: Tracker) -> dict[str, Any]:
    """Writes report.html and samples.json, and tracks the report and a table of the samples in MLflow.

    Returns an empty mapping: `run_job` adds the mapping of its `conclude` function to run.json.
    """
    report = render_report(job, outcome, totals)
    tracker.artifact("report.html", report)
    if outcome.samples:
        tracker.artifact("samples.json", _sample_table(outcome.samples))
    job.output.write("report.html", report.encode())
    write_json(job.output, SAMPLES, outcome.samples)
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
