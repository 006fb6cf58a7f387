"""The checks that surround every selector's choice of k out of N visual tokens.

`choose_tokens` checks the features and k, calls the selector, checks its answer and sorts it.

Shape suffixes: B images, N visual tokens, D feature width.
"""

import math
import operator
from collections.abc import Callable

from torch import Tensor, float64, int64

from otprune.kernel import compute_dtype

Choose = Callable[[Tensor, int], Tensor]
"""A selector: (features [B, N, D], k) -> int64 [B, k] of distinct token indices in any order."""


def choose_tokens(choose: Choose, features: Tensor, k: int, *, trusted: bool = False) -> Tensor:
    """The indices of the tokens that `choose` keeps: int64 [B, k], ascending, on the features' device.

    Args:
        features: [B, N, D], any floating type.
        choose: the selector. It gets features of the same shape, detached and checked.
        k: number of tokens to keep, in [1, N].
        trusted: skip the check of the selector's answer. The check synchronises the host with the device.

    Raises:
        ValueError: features not 3-D, not floating, or holding NaN or inf; k outside [1, N]; an answer that
            breaks the contract of `Choose`.
    """
    k = _check_shapes(features, k)
    features = _check_values(features.detach())
    keep = choose(features, k)
    if not trusted:
        _check_answer(keep, features, k)
    return keep.sort(dim=-1).values


def _check_shapes(features: Tensor, k: int) -> int:
    if features.ndim != 3:
        raise ValueError(f"features must be [images, tokens, width], got shape {list(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"features must be floating point, got {features.dtype}")
    try:
        k = operator.index(k)
    except TypeError:
        raise ValueError(f"k must be an integer, got {k!r}") from None
    if not 1 <= k <= features.shape[1]:
        raise ValueError(f"k must be in [1, {features.shape[1]}] (the number of tokens), got {k}")
    return k


def _check_values(features: Tensor) -> Tensor:
    """The features, rescaled where the squares of their values would overflow or underflow in float32.

    Rescaling changes no choice, because every selector ignores a scale that all features share.

    Raises:
        ValueError: if a value is NaN or inf.
    """
    if features.numel() == 0:
        return features
    # One reduction, read once by the host, answers both questions: aminmax propagates NaN, and the bounds show inf.
    low, high = (float(bound) for bound in features.aminmax())
    if math.isnan(low):
        raise ValueError("features must be finite, got NaN")
    magnitude = max(-low, high)
    if math.isinf(magnitude):
        raise ValueError("features must be finite, got inf")
    if magnitude and not 1e-12 < magnitude < 1e12:
        return features.to(float64).div(magnitude).to(compute_dtype(features))
    return features


def _check_answer(keep: Tensor, features: Tensor, k: int) -> None:
    B, N, _ = features.shape
    if keep.dtype != int64 or keep.shape != (B, k) or keep.device != features.device:
        raise ValueError(
            f"method must return int64 [{B}, {k}] on {features.device}, "
            f"got {keep.dtype} {list(keep.shape)} on {keep.device}"
        )
    ascending = keep.sort(dim=-1).values
    is_repeated = (ascending[:, 1:] == ascending[:, :-1]).any()
    is_outside = ((ascending < 0) | (ascending >= N)).any()
    if bool(is_repeated | is_outside):  # combined on the device, so that the host waits once
        raise ValueError(f"method must return distinct indices in [0, {N}), got {keep.tolist()}")
