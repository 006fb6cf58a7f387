"""Recomputes ranks, relative scores and the printed p-value from the published tables alone.

Findings, each pinned by a test:
- All 31 printed ranks follow from one rule: rank the printed scores per benchmark; ties share the average rank.
- The printed p = 0.028 is not the p of all 33 scores, which is far smaller. Only one of the one-sided variants gives
  0.028: the scores of LLaVA-1.5-13B alone, by the normal approximation with continuity correction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipelines.study.published_tables import ONE_SHOT, ORIGINAL, TABLE_1, Row


def average_ranks(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean over benchmarks of each method's rank. Rank 1 is the highest score; equal scores share their mean rank.

    Args:
        scores: method -> scores, one per benchmark in the same order for all methods; higher is better.

    Raises:
        ValueError: if there are no methods or no benchmarks, or if methods have different numbers of scores.
    """
    if not scores or len({len(row) for row in scores.values()}) != 1 or not len(next(iter(scores.values()))):
        raise ValueError(f"scores must be one row of equal length >= 1 per method, got {dict(scores)}")
    columns = list(zip(*scores.values(), strict=True))
    return {
        method: fmean(_rank(score, column) for score, column in zip(row, columns, strict=True))
        for method, row in scores.items()
    }


def published_ranks(model: str) -> dict[str, tuple[float, float | None]]:
    """The recomputed (average rank, one-shot rank or None) of every pruned method in Table 1's block of `model`."""
    scores = {method: row.scores for method, row in _block(model).items() if method != ORIGINAL}
    ranks = average_ranks(scores)
    one_shot = average_ranks({method: scores[method] for method in ONE_SHOT})
    return {method: (ranks[method], one_shot.get(method)) for method in scores}


def relative_gains(model: str, method: str = "OTPrune", baseline: str = "DivPrune") -> list[float]:
    """Improvement of `method` over `baseline` on each benchmark, in percent of the baseline's printed score."""
    block = _block(model)
    pairs = zip(block[method].scores, block[baseline].scores, strict=True)
    return [100 * (score / base - 1) for score, base in pairs]


@dataclass(frozen=True, kw_only=True)
class WilcoxonVariant:
    """One way to run the signed-rank test. `scores` is the name of a model, or "all"."""

    scores: str
    alternative: str
    method: str
    correction: bool
    p_value: float


def wilcoxon_variants() -> list[WilcoxonVariant]:
    """Every reading of "signed-rank test of the relative gains over DivPrune" on the printed scores.

    The readings are the product of three choices: the scores of one model or of all; one-sided (greater) or two-sided;
    exact, or the normal approximation with or without continuity correction. Zero gains are dropped, as Wilcoxon did.
    With tied gains, the exact p is the one that SciPy computes.

    Raises:
        ImportError: if SciPy is not installed.
    """
    try:
        from scipy.stats import wilcoxon
    except ImportError as error:
        raise ImportError("wilcoxon_variants needs SciPy: pip install 'otprune[test]'") from error
    gains = {model: relative_gains(model) for model in TABLE_1}
    gains["all"] = [gain for model in TABLE_1 for gain in relative_gains(model)]
    variants = []
    for scores, values in gains.items():
        for alternative in ("greater", "two-sided"):
            for method, correction in (("exact", False), ("approx", False), ("approx", True)):
                result: Any = wilcoxon(values, alternative=alternative, method=method, correction=correction)
                variants.append(
                    WilcoxonVariant(
                        scores=scores,
                        alternative=alternative,
                        method=method,
                        correction=correction,
                        p_value=float(result.pvalue),
                    )
                )
    return variants


def _block(model: str) -> Mapping[str, Row]:
    if model not in TABLE_1:
        raise ValueError(f"model must be one of {', '.join(TABLE_1)}, got {model!r}")
    return TABLE_1[model]


def _rank(score: float, column: Sequence[float]) -> float:
    higher = sum(other > score for other in column)
    equal = sum(other == score for other in column)
    return higher + (equal + 1) / 2
