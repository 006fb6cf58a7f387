"""One choice of k tokens out of N, with everything around it that is the same for every selector.

Shape suffixes: B images, N visual tokens, D feature width.
"""

import math
import operator
from collections.abc import Callable

from torch import Tensor, float64, int64

from otprune.kernel import compute_dtype

Choose = Callable[[Tensor, int], Tensor]
"""(features [B, N, D], k) -> int64 [B, k] of distinct token indices in any order."""


def choose_tokens(choose: Choose, features: Tensor, k: int, *, trusted: bool = False) -> Tensor:
    """What `choose` keeps, int64 [B, k], ascending.

    Args:
        features: [B, N, D], any floating type.
        k: how many to keep, in [1, N].
        trusted: do not check the answer, which costs a host synchronisation.

    Raises:
        ValueError: features not 3-D, not floating, or holding NaN or inf; k outside [1, N]; an answer out of contract.
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
    """Refuses NaN and inf, at the price of one host synchronisation.

    Magnitudes whose squares would leave float32's range are rescaled: every method here ignores a common scale.
    """
    if features.numel() == 0:
        return features
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
    order = keep.sort(dim=-1).values
    repeated, outside = (order[:, 1:] == order[:, :-1]).any(), ((order < 0) | (order >= N)).any()
    if bool(repeated | outside):
        raise ValueError(f"method must return distinct indices in [0, {N}), got {keep.tolist()}")
