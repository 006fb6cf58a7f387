"""The front door: which k of an image's N visual tokens to keep.

Shape suffixes: B images, N visual tokens, D feature width.
"""

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from otprune.kernel import GAMMA_SCALES, compute_dtype
from otprune.methods.divprune import divprune
from otprune.methods.logdet_linear import logdet_linear
from otprune.methods.otprune import otprune
from otprune.methods.positional import first, last, random, uniform

Selector = Callable[[Tensor, int], Tensor]

METHODS = (
    "otprune",
    "otprune_centered",
    "logdet_linear",
    "logdet_linear_centered",
    "divprune",
    "random",
    "uniform",
    "first",
    "last",
)


def select_tokens(
    features: Tensor,
    k: int,
    *,
    method: str | Selector = "otprune",
    gamma: float | None = None,
    gamma_scale: str = "released",
    seed: int | Tensor = 0,
) -> Tensor:
    """Indices int64 [B, k], ascending and on the same device, of the tokens to keep; each image by itself.

    Args:
        features: projected visual tokens [B, N, D], any floating type. Computed in float32, float64 for float64.
        k: how many to keep, in [1, N]; `num_kept` turns a retention into it.
        method: one of METHODS, or a callable (features, k) -> int64 [B, k] of distinct indices in any order.
        gamma: scale inside the log-det, positive; None is the method's own default. otprune and otprune_centered: 0.01
            on the released and paper scales, 0.5 on the trace scale. logdet_linear and logdet_linear_centered: 1.0,
            always on the trace scale. Other methods have none.
        gamma_scale: released | paper | trace: what gamma means to the two otprune methods (kernel.py).
        seed: for method "random": an int (one subset for all images) or int64 [B] (one per image).

    Raises:
        ValueError: features not 3-D, not floating, or holding NaN or inf; k outside [1, N]; an unknown method or
            gamma_scale; gamma not positive and finite; a seed of another shape; a callable's answer out of contract.
    """
    k = _check_shapes(features, k)
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.shape != features.shape[:1]):
        raise ValueError(f"seed must be an int or int64 [{features.shape[0]}], got {seed.dtype} {list(seed.shape)}")
    selector = _named(method, gamma, gamma_scale, seed) if isinstance(method, str) else method
    features = _check_values(features.detach())
    keep = selector(features, k)
    if not isinstance(method, str):
        _check_answer(keep, features, k)
    return keep.sort(dim=-1).values


def num_kept(retention: float, num_tokens: int) -> int:
    """How many of `num_tokens` a retention in (0, 1] keeps: Python's round, at least 1. 0.098 of 576 is 56."""
    if not 0 < retention <= 1:
        raise ValueError(f"retention must be in (0, 1], got {retention}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    return max(1, round(retention * num_tokens))


def _named(method: str, gamma: float | None, gamma_scale: str, seed: int | Tensor) -> Selector:
    if gamma_scale not in GAMMA_SCALES:
        raise ValueError(f"gamma_scale must be one of {', '.join(GAMMA_SCALES)}, got {gamma_scale!r}")
    if gamma is not None and not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    selectors: dict[str, Selector] = {
        "otprune": lambda f, k: otprune(f, k, gamma=gamma, gamma_scale=gamma_scale),
        "otprune_centered": lambda f, k: otprune(f, k, gamma=gamma, gamma_scale=gamma_scale, centered=True),
        "logdet_linear": lambda f, k: logdet_linear(f, k, gamma=gamma),
        "logdet_linear_centered": lambda f, k: logdet_linear(f, k, gamma=gamma, centered=True),
        "divprune": divprune,
        "random": lambda f, k: random(f, k, seed=seed),
        "uniform": uniform,
        "first": first,
        "last": last,
    }
    if method not in selectors:
        raise ValueError(f"method must be a callable or one of {', '.join(METHODS)}, got {method!r}")
    return selectors[method]


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
        return features.to(torch.float64).div(magnitude).to(compute_dtype(features))
    return features


def _check_answer(keep: Tensor, features: Tensor, k: int) -> None:
    B, N, _ = features.shape
    if keep.dtype != torch.int64 or keep.shape != (B, k) or keep.device != features.device:
        raise ValueError(
            f"method must return int64 [{B}, {k}] on {features.device}, "
            f"got {keep.dtype} {list(keep.shape)} on {keep.device}"
        )
    order = keep.sort(dim=-1).values
    repeated, outside = (order[:, 1:] == order[:, :-1]).any(), ((order < 0) | (order >= N)).any()
    if bool(repeated | outside):
        raise ValueError(f"method must return distinct indices in [0, {N}), got {keep.tolist()}")
