"""Scores the predictions of a complete output, and renders the scores for people, for MLflow and as JSON."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmarks import RECORD_COLUMNS, Benchmark, Comparison, Record, Scores
from pipelines.config.load import to_yaml
from pipelines.output.reader import OutputReader
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.output.totals import Totals
from pipelines.report.environment import render_page
from pipelines.store import Store

if TYPE_CHECKING:
    from pipelines.run.job import Job
    from pipelines.run.outcome import Outcome


def score_output(
    output: Store, benches: Sequence[Benchmark], questions: Mapping[str, int], resamples: int
) -> list[Scores]:
    """Scores of each benchmark over all predictions of an output. `questions`: benchmark -> expected number.

    Raises:
        ValueError: if a benchmark has another number of predictions, or as `Benchmark.score`.
    """
    records = read_records(output)
    for bench in benches:
        if len(records[bench.name]) != questions[bench.name]:
            raise ValueError(
                f"{output.path} must hold {questions[bench.name]} predictions of {bench.name}, "
                f"got {len(records[bench.name])}"
            )
    return [bench.score(records[bench.name], resamples=resamples) for bench in benches]


def read_records(output: Store) -> dict[str, list[Record]]:
    """The columns of all predictions that scoring needs, by benchmark."""
    records: dict[str, list[Any]] = defaultdict(list)
    for row in _read(output, ["benchmark", *RECORD_COLUMNS]).to_pylist():
        records[row.pop("benchmark")].append(row)
    return records


def compare_outputs(
    benches: Sequence[Benchmark], ours: Sequence[Scores], theirs: Sequence[Scores], resamples: int
) -> dict[str, Comparison]:
    """Compares two outputs on each benchmark: score of `ours` minus score of `theirs`, its interval, a paired test."""
    return {
        bench.name: bench.compare(a, b, resamples=resamples) for bench, a, b in zip(benches, ours, theirs, strict=True)
    }


def predictions_parquet(output: Store) -> bytes:
    """All predictions with all columns, as one Parquet file."""
    pq.write_table(_read(output, None), stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()


def score_metrics(scores: Sequence[Scores]) -> dict[str, float]:
    """Metrics and the ends of their 95 % intervals, unscaled, by MLflow name."""
    metrics = {}
    for score in scores:
        for name, value in score.metrics.items():
            path = f"accuracy/{score.benchmark}/{name}"
            low, high = score.intervals[name]
            metrics |= {path: value, f"{path}/low": low, f"{path}/high": high}
    return metrics


def as_json(scores: Sequence[Scores], comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """The scores as JSON, without the values of single questions, which the predictions hold."""
    record: dict[str, Any] = {}
    for score in scores:
        record[score.benchmark] = {
            "headline": score.headline,
            "scale": score.scale,
            "metrics": score.metrics,
            "intervals": score.intervals,
            "questions": score.questions,
            "unanswered": score.unanswered,
            "groups": len(score.group_ids),
            "categories": score.categories,
        }
        if score.benchmark in comparisons:
            compared = comparisons[score.benchmark]
            record[score.benchmark]["against_baseline"] = {name: getattr(compared, name) for name in compared.__slots__}
    return record


def category_table(scores: Sequence[Scores]) -> dict[str, list]:
    """Columns benchmark, category, metric, value: the breakdown of every benchmark with categories."""
    rows = [
        (score.benchmark, category, metric, value)
        for score in scores
        for category, metrics in score.categories.items()
        for metric, value in metrics.items()
    ]
    return {name: [row[i] for row in rows] for i, name in enumerate(("benchmark", "category", "metric", "value"))}


def render_scores(
    job: "Job", scores: Sequence[Scores], comparisons: Mapping[str, Comparison], outcome: "Outcome", totals: Totals
) -> str:
    """scores.html, a self-contained page."""
    return render_page(
        "accuracy/scores.html.jinja",
        kind="scores",
        fingerprint=job.fingerprint,
        config_yaml=to_yaml(job.config),
        machines=(f"{outcome.cluster}.",) if outcome.cluster else (),
        config=job.config,
        scores=scores,
        comparisons=comparisons,
        metrics=outcome.metrics,
        totals=totals,
    )


def _read(output: Store, columns: list[str] | None) -> pa.Table:
    return pa.concat_tables(OutputReader(output, PREDICTIONS_FOLDER).tables(columns))
