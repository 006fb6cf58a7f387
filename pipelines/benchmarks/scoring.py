"""Scores records: sums over scoring groups give every metric, its interval and its breakdown.

A benchmark defines the counts of a group (`statistics`) and how summed counts become metrics (`combine`). The same two
functions give the score (sums over all groups), a category (over its groups), a confidence interval (over resampled
groups) and the interval of the difference of two runs (over the same resamples of both).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.benchmarks.rows import Record
from pipelines.metrics.bootstrap import LEVEL, RESAMPLES, Combine, bootstrap, percentile_interval, resampled_sums
from pipelines.metrics.sums import ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """How one benchmark is scored."""

    headline: str  # the metric that papers print
    scale: float  # factor from the raw metric to the papers' units: 100 if they print per cent
    statistics: Callable[[list[list[Record]]], np.ndarray]  # groups -> float64 [G, S], additive
    combine: Combine  # sums [..., S] -> metric name -> [...]
    value: int = 0  # column of the statistics that the paired test of two runs compares, group by group


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of one run on one benchmark. Metrics are raw: multiply the headline by `scale` to compare with papers."""

    benchmark: str
    headline: str
    scale: float
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    categories: dict[str, dict[str, float]]  # category -> metric -> value, with `groups` among the metrics
    questions: int
    unanswered: int  # questions with an empty answer or without one; all of them count as wrong
    group_ids: list[str]
    values: np.ndarray = field(repr=False)  # [G], for paired tests
    statistics: np.ndarray = field(repr=False)  # [G, S]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Run a compared with run b on the same questions: a - b, its interval, and a test of the difference."""

    difference: float  # of the headline metric, raw
    interval: tuple[float, float]
    test: str  # mcnemar | wilcoxon
    p: float
    better: int  # groups where a scores higher
    worse: int


def mean_scorer(name: str, score: Callable[[Record], float], scale: float = 100.0) -> Scorer:
    """A scorer with one metric, the mean of `score` over questions. Every question is its own group."""

    def statistics(groups: list[list[Record]]) -> np.ndarray:
        return np.array([[sum(map(score, group)), len(group)] for group in groups], np.float64)

    return Scorer(
        headline=name,
        scale=scale,
        statistics=statistics,
        combine=lambda sums: {name: ratio(sums[..., 0], sums[..., 1])},
    )


def score_records(
    benchmark: str, scorer: Scorer, records: Iterable[Record], *, resamples: int = RESAMPLES, seed: int = 0
) -> Scores:
    """Scores of all records of one run; their order does not matter.

    Raises:
        ValueError: if there are no records, a question appears twice, or a group is incomplete.
    """
    answered = [_with_prediction(record) for record in records]
    _check_unique(benchmark, answered)
    groups = _by_group(answered)
    try:
        statistics = scorer.statistics(list(groups.values()))
    except ValueError as error:
        raise ValueError(f"benchmark {benchmark!r}: {error}") from error
    totals = scorer.combine(statistics.sum(axis=0))
    return Scores(
        benchmark=benchmark,
        headline=scorer.headline,
        scale=scorer.scale,
        metrics={name: float(value) for name, value in totals.items()},
        intervals=bootstrap(statistics, scorer.combine, resamples=resamples, seed=seed),
        categories=_by_category(list(groups.values()), statistics, scorer.combine),
        questions=len(answered),
        unanswered=sum(not (record["prediction"] or "").strip() for record in answered),
        group_ids=list(groups),
        values=statistics[:, scorer.value].copy(),
        statistics=statistics,
    )


def compare_scores(
    ours: Scores, theirs: Scores, scorer: Scorer, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compares two runs on the same groups: paired bootstrap of the headline, and a paired test of the groups' values.

    The test is McNemar's if every group is right or wrong, else Wilcoxon's.

    Raises:
        ValueError: if the two runs are of different benchmarks or groups.
    """
    from pipelines.metrics.compare import mcnemar_p, wilcoxon_p  # imported here: scipy takes a second to load

    if (ours.benchmark, ours.group_ids) != (theirs.benchmark, theirs.group_ids):
        raise ValueError(
            f"runs must be of the same questions, got {ours.benchmark!r} with {len(ours.group_ids)} groups and "
            f"{theirs.benchmark!r} with {len(theirs.group_ids)}"
        )
    # Both runs stand side by side in one table, so that they share every resample.
    both = resampled_sums(np.hstack([ours.statistics, theirs.statistics]), resamples, seed)
    width = ours.statistics.shape[1]
    differences = scorer.combine(both[:, :width])[ours.headline] - scorer.combine(both[:, width:])[ours.headline]
    is_binary = bool(np.isin(np.concatenate([ours.values, theirs.values]), (0, 1)).all())
    return Comparison(
        difference=ours.metrics[ours.headline] - theirs.metrics[ours.headline],
        interval=percentile_interval(differences, LEVEL),
        test="mcnemar" if is_binary else "wilcoxon",
        p=(mcnemar_p if is_binary else wilcoxon_p)(ours.values, theirs.values),
        better=int((ours.values > theirs.values).sum()),
        worse=int((ours.values < theirs.values).sum()),
    )


def _with_prediction(record: Record) -> Record:
    return record if record["prediction"] is not None else {**record, "prediction": ""}


def _check_unique(benchmark: str, records: Sequence[Record]) -> None:
    if not records:
        raise ValueError(f"benchmark {benchmark!r}: records must not be empty, got none")
    ids: set[str] = set()
    for record in records:
        if record["question_id"] in ids:
            raise ValueError(
                f"benchmark {benchmark!r}: question ids must be unique, got {record['question_id']!r} twice"
            )
        ids.add(record["question_id"])


def _by_group(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The groups sorted by id, so that a resample draws the same groups for any order of the records."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["group_id"], record["question_id"])):
        groups.setdefault(record["group_id"], []).append(record)
    return groups


def _by_category(
    groups: Sequence[list[Record]], statistics: np.ndarray, combine: Combine
) -> dict[str, dict[str, float]]:
    """The metrics of every category. A group of `a/b` counts for `a` and for `a/b`; one without a category for none."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        levels = group[0]["category"].split("/") if group[0]["category"] else []
        for depth in range(1, len(levels) + 1):
            members.setdefault("/".join(levels[:depth]), []).append(i)
    table = {}
    for category in sorted(members):
        metrics = combine(statistics[members[category]].sum(axis=0))
        table[category] = {"groups": len(members[category]), **{name: float(value) for name, value in metrics.items()}}
    return table
