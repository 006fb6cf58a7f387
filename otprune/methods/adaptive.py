"""A budget for each picture: linear log-det selection that stops where another token would tell too little.

`logdet_linear_centered` picks tokens by their gain, the information in nats that a token adds to those kept:

    gain of the next pick  =  log(1 + g v^T (I + g sum over the picks of c c^T)^-1 v)

Gains only fall (the objective is submodular). Each picture keeps the picks whose gain is at least a threshold: a plain
picture few, a crowded one many. The threshold is calibrated: `calibrate` takes pictures of the corpus and returns the
threshold at which they keep the wanted share of their tokens together. A picture keeps at least one token, and at most
`most` times the wanted share, so that one picture cannot fill a batch.

Shape suffixes: B pictures, N visual tokens, D feature width, K picks.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from otprune.greedy import greedy_gains
from otprune.kernel import mean_square_length, unit_columns
from otprune.methods.base import Reducer
from otprune.methods.logdet_linear import DEFAULT_GAMMA, LOGDET_LINEAR
from otprune.methods.reduction import Reduced, Seen, keep_rows
from otprune.methods.settings import Setting
from otprune.schedules import num_kept

DEFAULT_MOST = 3.0


def picks_and_gains(features_BND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(token indices int64 [B, K] in the order picked, the gain of each pick in nats float [B, K]), K = min(k, N)."""
    tokens_BND = unit_columns(features_BND, centered=True)
    ridge_B = mean_square_length(tokens_BND) / DEFAULT_GAMMA
    picks_BK, excess_BK = greedy_gains(tokens_BND, ridge_B, min(k, features_BND.shape[1]))
    # A picture of equal tokens has no variance: nothing is gained after its first token.
    scaled_BK = excess_BK / ridge_B.clamp_min(torch.finfo(ridge_B.dtype).tiny)[:, None]
    return picks_BK, torch.log1p(scaled_BK.clamp_min(0))


def num_above(gains_BK: Tensor, threshold: float) -> list[int]:
    """The number of first picks of each picture whose gain is at least `threshold`, and at least 1."""
    return (gains_BK >= threshold).long().cumprod(dim=-1).sum(dim=-1).clamp_min(1).tolist()


def most_kept(k: int, num_tokens: int, most: float) -> int:
    """The largest number of tokens of one picture, where `k` is the wanted mean."""
    return min(num_tokens, max(1, math.floor(most * k)))


def calibrate(features: Iterable[Tensor], *, retention: float, most: float) -> dict[str, Any]:
    """{"threshold": the gain, "kept": the mean share of tokens that the pictures keep by it}.

    Args:
        features: tokens [N, D] of each picture.
        retention: the wanted share of all pictures' tokens together.

    Raises:
        ValueError: if there is no picture.
    """
    gains, total = [], 0
    for features_ND in features:
        num_tokens = len(features_ND)
        cap = most_kept(num_kept(retention, num_tokens), num_tokens, most)
        gains.append(picks_and_gains(features_ND[None], cap)[1][0].double().cpu())
        total += num_tokens
    if not gains:
        raise ValueError("samples must hold at least one picture, got none")
    later = torch.cat([gains_K[1:] for gains_K in gains]).sort(descending=True).values  # the first of each is kept
    wanted = round(retention * total) - len(gains)
    threshold = float(later[min(wanted, len(later)) - 1]) if min(wanted, len(later)) > 0 else math.inf
    kept = sum(num_above(gains_K[None], threshold)[0] for gains_K in gains)
    return {"threshold": min(threshold, 1e30), "kept": kept / total}


def _reduce(seen: Seen, k: int, *, threshold: float | None, most: float) -> list[list[Reduced]]:
    assert threshold is not None, "the settings have not been resolved"
    cap = most_kept(k, seen.features.shape[1], most)
    picks_BK, gains_BK = picks_and_gains(seen.features, cap)
    kept = []
    for features_ND, picks_K, number in zip(seen.features, picks_BK, num_above(gains_BK, threshold), strict=True):
        kept.append(keep_rows(features_ND[None], picks_K[None, :number].sort(dim=-1).values))
    return kept


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """As `logdet_linear`, for the picks up to the largest number; by default three times the mean."""
    return LOGDET_LINEAR.cost(num_tokens, width, most_kept(kept, num_tokens, DEFAULT_MOST), True)


METHOD = Reducer(
    name="logdet_adaptive",
    reduce=_reduce,
    cost=_cost,
    calibrate=calibrate,
    settings={
        "threshold": Setting(
            meaning="least gain of a token, in nats: a number, or the file of jobs/calibrate.py",
            kind="number or file",
            low=0,
        ),
        "most": Setting(
            meaning="most tokens of one picture, in multiples of retention", kind="number", default=DEFAULT_MOST, low=1
        ),
    },
)
