"""The guarantee of OTPrune's greedy search (paper Eq. 9), held against the best of all subsets.

It is about the surrogate log det K_CC alone: greedy reaches at least 1 - 1/e of its best value. It says nothing about
the trace objective or about any distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from otprune.select import select_tokens
from pipelines.study.subsets import all_subsets, normal_tokens, surrogate_of_subsets


@dataclass(frozen=True, kw_only=True)
class GreedyResult:
    """Greedy over best value of log det K_CC, over data sets. The guarantee is `worst_ratio` >= 1 - 1/e = 0.632."""

    num_tokens: int
    width: int
    keep: int
    gamma: float
    num_seeds: int
    worst_ratio: float
    mean_ratio: float
    share_optimal: float


def greedy_study(num_tokens: int, width: int, keep: int, *, gamma: float = 0.01, num_seeds: int = 20) -> GreedyResult:
    """OTPrune's greedy set against the best of all subsets, by the surrogate it optimises (paper Eq. 8 and 9)."""
    ratios = [greedy_ratio(num_tokens, width, keep, seed, gamma=gamma) for seed in range(num_seeds)]
    return summarize_greedy(num_tokens, width, keep, gamma, ratios)


def greedy_ratio(num_tokens: int, width: int, keep: int, seed: int, *, gamma: float = 0.01) -> float:
    """The surrogate of the greedy set over that of the best of all subsets, on the data set of `seed`."""
    tokens = normal_tokens(num_tokens, width, seed)
    greedy = select_tokens(tokens[None], keep, method="otprune", gamma=gamma, gamma_scale="released")
    values = surrogate_of_subsets(tokens, torch.cat([greedy, all_subsets(num_tokens, keep)]), gamma=gamma)
    return float(values[0] / values[1:].max())


def summarize_greedy(num_tokens: int, width: int, keep: int, gamma: float, ratios: Sequence[float]) -> GreedyResult:
    """The worst and the mean of `ratios`, and the share of them that are 1."""
    return GreedyResult(
        num_tokens=num_tokens,
        width=width,
        keep=keep,
        gamma=gamma,
        num_seeds=len(ratios),
        worst_ratio=min(ratios),
        mean_ratio=fmean(ratios),
        share_optimal=fmean(ratio > 1 - 1e-9 for ratio in ratios),
    )
