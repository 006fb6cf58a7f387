"""Makes one table of the evaluated points of a grid: scores, intervals, costs, and tests of the differences.

There are two kinds of intervals. The interval of a benchmark's score resamples the scoring groups of this benchmark
(bootstrap), as elsewhere. `relative` is the mean over benchmarks of score / unpruned score, and its interval resamples
images: all points and benchmarks share the same resamples. So a resample takes all questions about an image or none,
and two points are compared on the same images.

Among many comparisons, some differences look real by chance. The `*_q` columns are therefore p-values corrected as
Benjamini and Hochberg (1995) do, over all points and benchmarks of the table: of the differences with q < 0.05, one in
twenty is expected to be no difference at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from otprune.methods import BASELINES, UNPRUNED
from pipelines.benchmarks import Benchmark, Comparison, Scores
from pipelines.metrics.bootstrap import LEVEL, percentile_interval, resampled_sums
from pipelines.output.reader import OutputReader
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.run.job import Job
from pipelines.store import Store

BASELINE, *_ = BASELINES
SLACK = 1.1  # prefill cost / budget, up to which a point is within the budget


@dataclass(frozen=True, slots=True)
class Point:
    """A method at a retention. `method` may name a variant, such as cdpruner:words."""

    method: str
    retention: float

    @property
    def base(self) -> str:
        """The method without the name of the variant."""
        return self.method.partition(":")[0]

    @property
    def name(self) -> str:
        """The name of the point's folder."""
        method = self.method.replace(":", ".")
        return method if method == UNPRUNED else f"{method}-{self.retention:g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """An evaluated point of the grid."""

    point: Point
    job: Job
    scores: Mapping[str, Scores]  # by benchmark
    images: Mapping[str, Mapping[str, str]]  # benchmark -> scoring group -> image
    work: Mapping[str, float | None]  # as `point_cost.measure_work`
    distance: dict[str, float] = field(default_factory=dict)  # as `distance.distances`; empty if not measured

    @property
    def over_budget(self) -> bool:
        """Whether the point's prefill costs over a tenth more than a selector's prefill at the same retention.

        A method inside the model exceeds the budget if one full layer alone costs more; M3 if the retention lies
        between two of its grids; PruMerge+ by its own rule. The page ranks no such point among those within the budget.
        """
        return (self.work["budget"] or 0.0) > SLACK


@dataclass(frozen=True, slots=True)
class Relative:
    """Mean over benchmarks of score / unpruned score, of P points: over all images [P], and over R resamples [P, R]."""

    values: np.ndarray
    draws: np.ndarray

    def interval(self, i: int) -> tuple[float, float]:
        """The ends of the 95 % interval of point i."""
        return percentile_interval(self.draws[i], LEVEL)

    def difference(self, i: int, j: int) -> tuple[float, float, float]:
        """Point i minus point j, and the ends of the 95 % interval of this difference."""
        return float(self.values[i] - self.values[j]), *percentile_interval(self.draws[i] - self.draws[j], LEVEL)


def accuracy_table(measured: Sequence[Measured], benches: Sequence[Benchmark], resamples: int) -> pa.Table:
    """One row for each point and benchmark. Scores, ends of intervals and differences are in the papers' units.

    `vs_none_*` compares the point with the unpruned model on the same questions, `vs_random_*` with random tokens at
    the same retention: difference, ends of its paired bootstrap interval, p of a paired test (McNemar if answers are
    right or wrong, else Wilcoxon), q. These columns are null if the grid lacks the other point. `over_budget`: see
    `Measured`.
    """
    relative = relative_scores(measured, benches, resamples)
    rows = []
    for i, evaluated in enumerate(measured):
        low, high = relative.interval(i)
        of_point = {
            "method": evaluated.point.method,
            "retention": evaluated.point.retention,
            "over_budget": evaluated.over_budget,
            **evaluated.work,
            "relative": float(relative.values[i]),
            "relative_low": low,
            "relative_high": high,
            "trace_objective": evaluated.distance.get("trace_objective"),
            "gaussian_w2": evaluated.distance.get("gaussian_w2"),
        }
        for bench in benches:
            rows.append(of_point | _score(evaluated.scores[bench.name]))
            for name, other in (
                ("vs_none", find_point(measured, UNPRUNED, 1.0)),
                ("vs_random", find_point(measured, BASELINE, evaluated.point.retention)),
            ):
                scores, compared = evaluated.scores[bench.name], None
                if other is not None and other is not evaluated:
                    compared = bench.compare(scores, other.scores[bench.name], resamples=resamples)
                rows[-1] |= _compared(name, compared, scores.scale)
    for name in ("vs_none", "vs_random"):
        _add_q_values(rows, name)
    return pa.Table.from_pylist(rows)


def find_point(measured: Sequence[Measured], method: str, retention: float) -> Measured | None:
    """The evaluated point of the method at the retention; None if the grid lacks it."""
    return next((evaluated for evaluated in measured if evaluated.point == Point(method, retention)), None)


def relative_scores(
    measured: Sequence[Measured], benches: Sequence[Benchmark], resamples: int, seed: int = 0
) -> Relative:
    """The `Relative` of all points. The first point must be the unpruned model.

    A benchmark on which the unpruned model scores 0 in any resample is left out, because the ratio does not exist. All
    values are NaN if no benchmark is left.
    """
    images = sorted({image for by_group in measured[0].images.values() for image in by_group.values()})
    row_of = {image: i for i, image in enumerate(images)}
    headlines = np.stack([_headlines(evaluated, benches, row_of, resamples, seed) for evaluated in measured])
    usable = [i for i in range(len(benches)) if (headlines[0, i] > 0).all()]
    if not usable:
        return Relative(np.full(len(measured), np.nan), np.full((len(measured), resamples), np.nan))
    shares = (headlines[:, usable] / headlines[:1, usable]).mean(axis=1)  # column 0 is of all images
    return Relative(shares[:, 0], shares[:, 1:])


def _headlines(
    evaluated: Measured, benches: Sequence[Benchmark], row_of: Mapping[str, int], resamples: int, seed: int
) -> np.ndarray:
    """The headline metric of every benchmark, over all images and then over each resample: [benchmarks, 1 + R].

    The same seed draws the same images, so that column r of every point is of the same resample. The statistics of all
    benchmarks are stacked side by side, which makes one matrix product resample all benchmarks at once.
    """
    parts = []
    for bench in benches:
        scores = evaluated.scores[bench.name]
        sums = np.zeros((len(row_of), scores.statistics.shape[1]))
        rows = [row_of[evaluated.images[bench.name][group]] for group in scores.group_ids]
        np.add.at(sums, rows, scores.statistics)
        parts.append(sums)
    table = np.hstack(parts)
    totals = np.vstack([table.sum(axis=0), resampled_sums(table, resamples, seed)])
    ends = np.cumsum([part.shape[1] for part in parts])
    return np.stack(
        [
            bench.scorer.combine(totals[:, end - part.shape[1] : end])[bench.scorer.headline]
            for bench, part, end in zip(benches, parts, ends, strict=True)
        ]
    )


def image_of_groups(output: Store) -> dict[str, dict[str, str]]:
    """Benchmark -> scoring group -> its image (the first image, if the group has several).

    The folder of the data set is part of the image's name, because two data sets may use the same id.
    """
    images: dict[str, dict[str, str]] = {}
    columns = ["benchmark", "group_id", "source", "image_id"]
    for table in OutputReader(output, PREDICTIONS_FOLDER).tables(columns):
        for benchmark, group, source, image in zip(*(column.to_pylist() for column in table.columns), strict=True):
            folder = source.rpartition("/")[0]
            images.setdefault(benchmark, {}).setdefault(group, f"{folder}/{image}")
    return images


def _score(scores: Scores) -> dict[str, Any]:
    low, high = scores.intervals[scores.headline]
    return {
        "benchmark": scores.benchmark,
        "metric": scores.headline,
        "score": scores.scale * scores.metrics[scores.headline],
        "low": scores.scale * low,
        "high": scores.scale * high,
        "questions": scores.questions,
        "unanswered": scores.unanswered,
        "metrics": [
            {"name": name, "value": value, "low": scores.intervals[name][0], "high": scores.intervals[name][1]}
            for name, value in scores.metrics.items()
        ],
    }


def _compared(name: str, compared: Comparison | None, scale: float) -> dict[str, Any]:
    low, high = compared.interval if compared else (None, None)
    return {
        name: compared and scale * compared.difference,
        f"{name}_low": low and scale * low,
        f"{name}_high": high and scale * high,
        f"{name}_test": compared and compared.test,
        f"{name}_p": compared and compared.p,
        f"{name}_q": None,
    }


def _add_q_values(rows: list[dict[str, Any]], name: str) -> None:
    """Fills in the q of every comparison of one kind, vs_none or vs_random."""
    from scipy.stats import false_discovery_control  # imported here, because scipy takes a second to load

    tested = [row for row in rows if row[f"{name}_p"] is not None]
    if tested:
        for row, q in zip(tested, false_discovery_control([row[f"{name}_p"] for row in tested]), strict=True):
            row[f"{name}_q"] = float(q)
