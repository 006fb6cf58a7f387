"""The front door: which k of an image's N visual tokens to keep.

Shape suffixes: B images, N visual tokens, D feature width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from otprune.choice import Choose, choose_tokens
from otprune.kernel import GAMMA_SCALES
from otprune.methods import METHODS as ALL_METHODS
from otprune.methods import Selector
from otprune.schedules import num_kept

__all__ = ["METHODS", "num_kept", "select_tokens"]

METHODS = tuple(name for name, method in ALL_METHODS.items() if isinstance(method, Selector))


def select_tokens(
    features: Tensor,
    k: int,
    *,
    method: str | Selector | Choose = "otprune",
    gamma: float | None = None,
    gamma_scale: str = "released",
    seed: int | Tensor = 0,
    **settings: Any,
) -> Tensor:
    """Indices int64 [B, k], ascending and on the same device, of the tokens to keep; each image by itself.

    Args:
        features: projected visual tokens [B, N, D], any floating type. Computed in float32, float64 for float64.
        k: how many to keep, in [1, N]; `num_kept` turns a retention into it.
        method: one of METHODS, a record of your own (`otprune.methods.Selector`), or a callable
            (features, k) -> int64 [B, k] of distinct indices in any order.
        gamma: scale inside the log-det, positive; None is the method's own default. otprune and otprune_centered: 0.01
            on the released and paper scales, 0.5 on the trace scale. logdet_linear and logdet_linear_centered: 1.0,
            always on the trace scale. Other methods have none and are not told it.
        gamma_scale: released | paper | trace: what gamma means to the two otprune methods (kernel.py).
        seed: for method "random": an int (one subset for all images) or int64 [B] (one per image).
        settings: the method's own.

    Raises:
        ValueError: features not 3-D, not floating, or holding NaN or inf; k outside [1, N]; an unknown method or
            gamma_scale; gamma not positive and finite; a seed of another shape; a setting that the method does not
            take, or out of its bounds; an answer out of contract of a callable or of a record of your own.
    """
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.shape != features.shape[:1]):
        raise ValueError(f"seed must be an int or int64 [{features.shape[0]}], got {seed.dtype} {list(seed.shape)}")
    if isinstance(method, str):
        method, trusted = _named(method), True
    else:
        trusted = False
    if not isinstance(method, Selector):
        if settings:
            raise ValueError(f"settings of a callable must be absent, got {next(iter(settings))!r}")
        return choose_tokens(method, features, k)
    _check_gamma(gamma, gamma_scale)
    choose = method.bind(method.check(settings), {"gamma": gamma, "gamma_scale": gamma_scale, "seed": seed})
    return choose_tokens(choose, features, k, trusted=trusted)


def _named(name: str) -> Selector:
    method = ALL_METHODS.get(name)
    if not isinstance(method, Selector):
        raise ValueError(f"method must be a callable or one of {', '.join(METHODS)}, got {name!r}")
    return method


def _check_gamma(gamma: float | None, gamma_scale: str) -> None:
    if gamma_scale not in GAMMA_SCALES:
        raise ValueError(f"gamma_scale must be one of {', '.join(GAMMA_SCALES)}, got {gamma_scale!r}")
    if gamma is not None and not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
