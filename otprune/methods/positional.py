"""Selectors that ignore the features: the baselines that any method must beat.

Each selector returns token indices int64 [B, k], ascending, on the features' device.
"""

import torch
from torch import Tensor

from otprune.methods.base import Selector


def first(features_BND: Tensor, k: int) -> Tensor:
    """Tokens 0 .. k-1: the top of the image in raster order."""
    return torch.arange(k, device=features_BND.device).repeat(features_BND.shape[0], 1)


def last(features_BND: Tensor, k: int) -> Tensor:
    """Tokens N-k .. N-1: the bottom of the image in raster order."""
    return first(features_BND, k) + (features_BND.shape[1] - k)


def uniform(features_BND: Tensor, k: int) -> Tensor:
    """The middle token of each of k equal parts of the raster order: floor((i + 1/2) N / k)."""
    return (2 * first(features_BND, k) + 1) * features_BND.shape[1] // (2 * k)


def random(features_BND: Tensor, k: int, *, seed: int | Tensor = 0) -> Tensor:
    """A random subset that depends on the seed alone: the k tokens with the smallest hash of (seed, token index).

    `seed` is an int (one subset for all images) or int64 [B] (one per image). A hash needs no generator and no state,
    so the subset is the same on every device, in every batch and at every batch size; the subset of k is contained in
    that of k + 1.
    """
    B, N, _ = features_BND.shape
    device = features_BND.device
    if isinstance(seed, int):
        seed = torch.full((B,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64)  # the low 64 bits of any int
    seed_B = seed.to(device)
    low_B, high_B = seed_B & _MASK, (seed_B >> 32) & _MASK
    key_B = _mix(_mix(low_B) ^ high_B)
    other_key_B = _mix(_mix(high_B ^ 0x5BD1E995) ^ low_B)
    token_N = torch.arange(N, device=device)
    hash_BN = _mix(_mix(token_N ^ key_B[:, None]) ^ other_key_B[:, None])
    # The token index in the low bits makes every key different: without ties, all devices agree on the order.
    return (hash_BN * 2**31 + token_N).topk(k, dim=-1, largest=False).indices.sort(dim=-1).values


_MASK = 0xFFFFFFFF  # the low 32 bits


def _mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64 (xor-shift, multiply); the product stays below 2^59."""
    for _ in range(2):
        value = ((value ^ (value >> 16)) * 0x45D9F3B) & _MASK
    return value ^ (value >> 16)


def _nothing(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """These selectors multiply nothing."""
    return 0


RANDOM = Selector(name="random", choose=random, cost=_nothing, shared=frozenset(("seed",)))
UNIFORM = Selector(name="uniform", choose=uniform, cost=_nothing)
FIRST = Selector(name="first", choose=first, cost=_nothing)
LAST = Selector(name="last", choose=last, cost=_nothing)

BLIND = (RANDOM, UNIFORM, FIRST, LAST)
"""All selectors that ignore the features."""
