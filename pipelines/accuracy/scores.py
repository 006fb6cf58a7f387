"""From the predictions of a whole output to scores, and what people and MLflow get to see of them."""

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
    """Scores of each benchmark over all predictions of an output; `questions` is how many each must have.

    Raises:
        ValueError: if there are more or fewer, or as `Benchmark.score`.
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
    """What scoring needs of all predictions, by benchmark."""
    records: dict[str, list[Any]] = defaultdict(list)
    for row in _read(output, ["benchmark", *RECORD_COLUMNS]).to_pylist():
        records[row.pop("benchmark")].append(row)
    return records


def compare_outputs(
    benches: Sequence[Benchmark], ours: Sequence[Scores], theirs: Sequence[Scores], resamples: int
) -> dict[str, Comparison]:
    """Each benchmark of two outputs, question by question: our score minus theirs, its interval, and a paired test."""
    return {
        bench.name: bench.compare(a, b, resamples=resamples) for bench, a, b in zip(benches, ours, theirs, strict=True)
    }


def predictions_parquet(output: Store) -> bytes:
    """All predictions as one object, of all columns."""
    pq.write_table(_read(output, None), stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()


def score_metrics(scores: Sequence[Scores]) -> dict[str, float]:
    """Metrics and the ends of their 95 % intervals under their MLflow names, unscaled."""
    metrics = {}
    for score in scores:
        for name, value in score.metrics.items():
            path = f"accuracy/{score.benchmark}/{name}"
            low, high = score.intervals[name]
            metrics |= {path: value, f"{path}/low": low, f"{path}/high": high}
    return metrics


def as_json(scores: Sequence[Scores], comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """Everything but the values of single questions, which the predictions hold."""
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
    """Columns benchmark, category, metric, value: the breakdown of every benchmark that has one."""
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
    """scores.html, self-contained."""
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
