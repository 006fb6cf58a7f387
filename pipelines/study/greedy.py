"""Tests the guarantee of OTPrune's greedy search (paper Eq. 9) against the best of all subsets.

The guarantee is about the surrogate log det K_CC alone: the greedy set reaches at least 1 - 1/e of the best value. The
guarantee says nothing about the trace objective or about any distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from otprune.select import select_tokens
from pipelines.study.subsets import all_subsets, normal_tokens, surrogate_of_subsets


@dataclass(frozen=True, kw_only=True)
class GreedyResult:
    """Ratios of the greedy to the best log det K_CC, over data sets. The guarantee: worst_ratio >= 1 - 1/e = 0.632."""

    num_tokens: int
    width: int
    keep: int
    gamma: float
    num_seeds: int
    worst_ratio: float
    mean_ratio: float
    share_optimal: float


def greedy_ratio(num_tokens: int, width: int, keep: int, seed: int, *, gamma: float = 0.01) -> float:
    """Surrogate of the greedy set / surrogate of the best of all subsets, on the data set of `seed`."""
    tokens = normal_tokens(num_tokens, width, seed)
    greedy = select_tokens(tokens[None], keep, method="otprune", gamma=gamma, gamma_scale="released")
    values = surrogate_of_subsets(tokens, torch.cat([greedy, all_subsets(num_tokens, keep)]), gamma=gamma)
    return float(values[0] / values[1:].max())


def summarize_greedy(num_tokens: int, width: int, keep: int, gamma: float, ratios: Sequence[float]) -> GreedyResult:
    """The worst and the mean of `ratios`, and the share of ratios that are 1."""
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
