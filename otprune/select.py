"""The library's entry point: `select_tokens` chooses which k of an image's N visual tokens to keep.

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
    """The indices of the tokens to keep, int64 [B, k], ascending, on the features' device.

    The choice of one image does not depend on the others in the batch.

    Args:
        features: projected visual tokens [B, N, D], any floating type. The choice is computed in float32, or in
            float64 for float64.
        k: number of tokens to keep, in [1, N]; `num_kept` computes it from a retention.
        method: one of METHODS, your own record (`otprune.methods.Selector`), or a callable
            (features, k) -> int64 [B, k] of distinct indices in any order.
        gamma: scale inside the log-det, positive; None is the method's own default. otprune and otprune_centered: 0.01
            on the released and paper scales, 0.5 on the trace scale. logdet_linear and logdet_linear_centered: 1.0,
            always on the trace scale. Other methods ignore it.
        gamma_scale: released | paper | trace: the meaning of gamma in the two otprune methods
            (`otprune.kernel.squared_kernel_ridge`).
        seed: for method "random": an int (one subset for all images) or int64 [B] (one per image).
        settings: the method's own settings.

    Raises:
        ValueError: features not 3-D, not floating, or holding NaN or inf; k outside [1, N]; an unknown method or
            gamma_scale; gamma not positive and finite; a seed of another shape; a setting that the method does not
            take, or out of its bounds; an answer of a callable or of your own record that breaks its contract.
    """
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.shape != features.shape[:1]):
        raise ValueError(f"seed must be an int or int64 [{features.shape[0]}], got {seed.dtype} {list(seed.shape)}")
    if isinstance(method, str):
        method, trusted = _selector_named(method), True
    else:
        trusted = False
    if not isinstance(method, Selector):
        if settings:
            raise ValueError(f"settings of a callable must be absent, got {next(iter(settings))!r}")
        return choose_tokens(method, features, k)
    _check_gamma(gamma, gamma_scale)
    choose = method.bind(method.check(settings), {"gamma": gamma, "gamma_scale": gamma_scale, "seed": seed})
    return choose_tokens(choose, features, k, trusted=trusted)


def _selector_named(name: str) -> Selector:
    method = ALL_METHODS.get(name)
    if not isinstance(method, Selector):
        raise ValueError(f"method must be a callable or one of {', '.join(METHODS)}, got {name!r}")
    return method


def _check_gamma(gamma: float | None, gamma_scale: str) -> None:
    if gamma_scale not in GAMMA_SCALES:
        raise ValueError(f"gamma_scale must be one of {', '.join(GAMMA_SCALES)}, got {gamma_scale!r}")
    if gamma is not None and not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
