"""What gamma means at another width, under its three scales.

The same synthetic images at several widths: tokens that lie near a space of RANK dimensions, with a common offset and
norms that differ, are embedded in D dimensions by a random matrix, so that their geometry is that of every other width
up to noise. A scale whose meaning does not depend on the width keeps the same tokens at every width.

For each selection: the share of tokens that it has in common with the selection of the same gamma and scale at the
reference width; the share in common with the k tokens of largest kernel diagonal, which is where a gamma too small ends
up (log det is linear then); and the trace objective over the mean of random subsets'.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from otprune.distance import trace_objective
from otprune.kernel import token_gram
from otprune.select import select_tokens
from pipelines.study.pieces import Row
from pipelines.study.subsets import random_subsets

RANK = 64
NUM_RANDOM = 8


def embedded_tokens(num_tokens: int, width: int, seed: int) -> Tensor:
    """Float32 [N, D]: the image of `seed`, whose latent tokens are the same at every width."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, RANK + 1).rsqrt()
    latent = torch.randn(num_tokens, RANK, generator=generator) * spectrum
    latent[:, 0] += 1.0  # the direction that all tokens of an image share
    latent = latent * torch.exp(0.4 * torch.randn(num_tokens, 1, generator=generator))
    generator = torch.Generator().manual_seed(1_000_003 * seed + width)
    embedded = latent @ torch.randn(RANK, width, generator=generator) / RANK**0.5
    return embedded + 0.02 * torch.randn(num_tokens, width, generator=generator)


def compare_widths(
    *, seed: int, tokens: int, kept: int, widths: Sequence[int], gammas: Sequence[float], scales: Sequence[str]
) -> list[Row]:
    """One row for each width, scale and gamma on the image of `seed`; the reference is the last of `widths`."""
    chosen: dict[tuple[int, str, float], Tensor] = {}
    rows: list[Row] = []
    for width in reversed(widths):
        features = embedded_tokens(tokens, width, seed)[None]
        chance = trace_objective(
            features.expand(NUM_RANDOM, -1, -1), random_subsets(tokens, kept, NUM_RANDOM, seed), normalize_columns=True
        ).mean()
        gram = token_gram(features)[0]
        largest = gram.square().sum(dim=1).topk(kept).indices
        for scale in scales:
            for gamma in gammas:
                keep = select_tokens(features, kept, method="otprune", gamma=gamma, gamma_scale=scale)
                chosen[width, scale, gamma] = keep[0]
                objective = trace_objective(features, keep, normalize_columns=True)[0]
                rows.append(
                    {
                        "seed": seed,
                        "width": width,
                        "scale": scale,
                        "gamma": gamma,
                        "overlap": overlap(keep[0], chosen[widths[-1], scale, gamma]),
                        "largest": overlap(keep[0], largest),
                        "objective": float(objective / chance),
                    }
                )
    return rows


def overlap(one: Tensor, other: Tensor) -> float:
    """Share of the tokens of `one` [k] that are in `other` [k]."""
    return float(torch.isin(one, other).double().mean())
