"""From the evaluated points of a grid to one table: scores, intervals, costs, and what the differences are worth.

Two kinds of interval. A benchmark's score: bootstrap over its scoring groups, as everywhere. `relative`, the mean over
benchmarks of score / unpruned score: bootstrap over images, the same resamples for all points and benchmarks, so that
questions about one image stand or fall together and two points are compared on the same images.

Many comparisons make some differences look real: `*_q` are p-values after Benjamini and Hochberg (1995) over all points
and benchmarks of the table; q < 0.05 means that one in twenty of the differences so marked is expected to be none.
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
SLACK = 1.1  # of a budget


@dataclass(frozen=True, slots=True)
class Point:
    """A method at a retention. `method` may name a variant of it, such as cdpruner:words."""

    method: str
    retention: float

    @property
    def base(self) -> str:
        """The method without its variant."""
        return self.method.partition(":")[0]

    @property
    def name(self) -> str:
        """Fit for a folder's name."""
        method = self.method.replace(":", ".")
        return method if method == UNPRUNED else f"{method}-{self.retention:g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """An evaluated point."""

    point: Point
    job: Job
    scores: Mapping[str, Scores]  # by benchmark
    images: Mapping[str, Mapping[str, str]]  # benchmark -> scoring group -> image
    work: Mapping[str, float | None]
    distance: dict[str, float] = field(default_factory=dict)

    @property
    def over_budget(self) -> bool:
        """Whether its prefill costs over a tenth more than that of a selector at its retention.

        Methods inside the model do that where one full layer alone is dearer than the budget; M3 between its grids;
        PruMerge+ by its own rule. Such points are not compared with those within the budget.
        """
        return (self.work["budget"] or 0.0) > SLACK


@dataclass(frozen=True, slots=True)
class Relative:
    """Mean over benchmarks of score / unpruned score: of all images [P], and of R resamples of them [P, R]."""

    values: np.ndarray
    draws: np.ndarray

    def interval(self, i: int) -> tuple[float, float]:
        return percentile_interval(self.draws[i], LEVEL)

    def difference(self, i: int, j: int) -> tuple[float, float, float]:
        """Point i minus point j, and the ends of its 95 % interval."""
        return float(self.values[i] - self.values[j]), *percentile_interval(self.draws[i] - self.draws[j], LEVEL)


def accuracy_table(measured: Sequence[Measured], benches: Sequence[Benchmark], resamples: int) -> pa.Table:
    """One row for each point and benchmark; scores, ends of intervals and differences in the papers' units.

    `vs_none_*` is the difference from the unpruned model on the same questions, `vs_random_*` from random tokens of the
    same number: difference, ends of its paired bootstrap interval, p of a paired test (McNemar where answers are right
    or wrong, else Wilcoxon), q. Null where there is nothing to compare with. `over_budget`: see `Measured`.
    """
    relative = relative_scores(measured, benches, resamples)
    rows = []
    for i, each in enumerate(measured):
        low, high = relative.interval(i)
        shared = {
            "method": each.point.method,
            "retention": each.point.retention,
            "over_budget": each.over_budget,
            **each.work,
            "relative": float(relative.values[i]),
            "relative_low": low,
            "relative_high": high,
            "trace_objective": each.distance.get("trace_objective"),
            "gaussian_w2": each.distance.get("gaussian_w2"),
        }
        for bench in benches:
            rows.append(shared | _score(each.scores[bench.name]))
            for name, other in (
                ("vs_none", find_point(measured, UNPRUNED, 1.0)),
                ("vs_random", find_point(measured, BASELINE, each.point.retention)),
            ):
                scores, compared = each.scores[bench.name], None
                if other is not None and other is not each:
                    compared = bench.compare(scores, other.scores[bench.name], resamples=resamples)
                rows[-1] |= _compared(name, compared, scores.scale)
    for name in ("vs_none", "vs_random"):
        _correct(rows, name)
    return pa.Table.from_pylist(rows)


def find_point(measured: Sequence[Measured], method: str, retention: float) -> Measured | None:
    return next((each for each in measured if each.point == Point(method, retention)), None)


def relative_scores(
    measured: Sequence[Measured], benches: Sequence[Benchmark], resamples: int, seed: int = 0
) -> Relative:
    """`Relative` of all points; the first must be the unpruned model.

    Benchmarks that it scores 0 on, in any resample, are left out; NaN if that leaves none.
    """
    images = sorted({image for each in measured[0].images.values() for image in each.values()})
    row_of = {image: i for i, image in enumerate(images)}
    headlines = np.stack([_headlines(each, benches, row_of, resamples, seed) for each in measured])
    known = [i for i in range(len(benches)) if (headlines[0, i] > 0).all()]
    if not known:
        return Relative(np.full(len(measured), np.nan), np.full((len(measured), resamples), np.nan))
    shares = (headlines[:, known] / headlines[:1, known]).mean(axis=1)
    return Relative(shares[:, 0], shares[:, 1:])


def _headlines(
    each: Measured, benches: Sequence[Benchmark], row_of: Mapping[str, int], resamples: int, seed: int
) -> np.ndarray:
    """Headline of every benchmark over all images, then over each resample [benchmarks, 1 + R].

    Equal seeds draw equal images, so that the columns of all points belong together.
    """
    parts = []
    for bench in benches:
        scores = each.scores[bench.name]
        sums = np.zeros((len(row_of), scores.statistics.shape[1]))
        rows = [row_of[each.images[bench.name][group]] for group in scores.group_ids]
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
    """Benchmark -> scoring group -> the image that it is about (the first, where it is about several).

    Images of different data sets are different, whatever their ids.
    """
    found: dict[str, dict[str, str]] = {}
    columns = ["benchmark", "group_id", "source", "image_id"]
    for table in OutputReader(output, PREDICTIONS_FOLDER).tables(columns):
        for benchmark, group, source, image in zip(*(column.to_pylist() for column in table.columns), strict=True):
            folder = source.rpartition("/")[0]
            found.setdefault(benchmark, {}).setdefault(group, f"{folder}/{image}")
    return found


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


def _correct(rows: list[dict[str, Any]], name: str) -> None:
    """Fills in the q of every comparison of one kind."""
    from scipy.stats import false_discovery_control  # scipy takes a second to load

    tested = [row for row in rows if row[f"{name}_p"] is not None]
    if tested:
        for row, q in zip(tested, false_discovery_control([row[f"{name}_p"] for row in tested]), strict=True):
            row[f"{name}_q"] = float(q)
