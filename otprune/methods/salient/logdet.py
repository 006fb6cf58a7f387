"""Saliency times coverage in one log-det, with one knob from coverage alone to saliency alone.

The method greedily maximises log det(I + g W_C G_C G_C^T W_C): OTPrune's kernel on the trace scale, whose token i is
weighted by w_i = s_i^p, with its saliency s_i (`saliency.py`, mean 1) and

    p = theta / (2 (1 - theta)).

The objective of a determinantal point process with qualities q and similarities S splits into 2 sum log q_i + log det S
(Kulesza and Taskar 2012); Chen et al. 2018 trade the two by theta / (2 (1 - theta)). theta = 0 is OTPrune, theta = 1
takes the most salient tokens.
"""

from functools import partial

import torch
from torch import Tensor

from otprune.choice import choose_tokens
from otprune.greedy import greedy_logdet
from otprune.kernel import (
    forms_kernel,
    gram,
    mean_diagonal,
    mean_square_length,
    squared_kernel_ridge,
    token_gram,
    unit_columns,
)
from otprune.methods.base import Reducer
from otprune.methods.otprune import DEFAULT_GAMMA, OTPRUNE
from otprune.methods.reduction import Reduced, Seen, keep_rows
from otprune.methods.salient.saliency import WISHES, saliency_of
from otprune.methods.settings import Setting

DEFAULT_THETA = 0.5


def logdet_salient(features_BND: Tensor, k: int, saliency_BN: Tensor, *, theta: float = DEFAULT_THETA) -> Tensor:
    """Token indices int64 [B, k] in the order picked. Time and memory as `otprune`.

    Args:
        features_BND: projected visual tokens, any floating type.
        k: number of tokens to keep, in [1, N].
        saliency_BN: at least 0, with a mean of 1 in each picture, in the dtype of the computation.
        theta: in [0, 1]: the weight of saliency against coverage.

    Raises:
        ValueError: on saliency of another shape, or theta outside [0, 1].
    """
    if saliency_BN.shape != features_BND.shape[:2]:
        raise ValueError(f"saliency must be {list(features_BND.shape[:2])}, got {list(saliency_BN.shape)}")
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must be in [0, 1], got {theta}")
    if theta == 1:
        return saliency_BN.argsort(dim=-1, descending=True, stable=True)[:, :k]  # stable: ties go to the lowest index
    weight_BN = saliency_BN ** (theta / (2 * (1 - theta)))
    if features_BND.device.type != "cpu":
        return _greedy(features_BND, weight_BN, k)
    pairs = zip(features_BND.split(1), weight_BN.split(1), strict=True)  # as `kernel.image_by_image_on_cpu`
    return torch.cat([_greedy(features, weight, k) for features, weight in pairs])


def _greedy(features_BND: Tensor, weight_BN: Tensor, k: int) -> Tensor:
    N = features_BND.shape[1]
    if forms_kernel(N):
        gram_BNN = token_gram(features_BND)
        ridge_B = squared_kernel_ridge(DEFAULT_GAMMA["trace"], "trace", mean_diagonal(gram_BNN), N, k)
        return greedy_logdet(gram_BNN * weight_BN[..., None], ridge_B, k)
    tokens_BND = unit_columns(features_BND)
    ridge_B = squared_kernel_ridge(DEFAULT_GAMMA["trace"], "trace", mean_square_length(tokens_BND), N, k)
    return greedy_logdet(tokens_BND * weight_BN[..., None], ridge_B, k, middle_BRR=gram(tokens_BND.mT))


def _reduce(seen: Seen, k: int, *, theta: float) -> list[list[Reduced]]:
    choose = partial(logdet_salient, saliency_BN=saliency_of(seen), theta=theta)
    return [[reduced] for reduced in keep_rows(seen.features, choose_tokens(choose, seen.features, k, trusted=True))]


METHOD = Reducer(
    name="logdet_salient",
    reduce=_reduce,
    cost=OTPRUNE.cost,
    wishes=WISHES,
    settings={
        "theta": Setting(
            meaning="weight of saliency against coverage: 0 is otprune on the trace scale, 1 the most salient tokens",
            kind="number",
            default=DEFAULT_THETA,
            low=0,
            high=1,
        )
    },
)
