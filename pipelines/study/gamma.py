"""Measures what gamma means at another feature width, on each of its three scales.

The same synthetic images exist at several widths. Their tokens lie near a space of RANK dimensions, share an offset and
differ in norm. A random matrix embeds them in D dimensions, so that their geometry is the same at every width, up to
noise. If the meaning of a scale does not depend on the width, the scale keeps the same tokens at every width.

Each selection has three values:

    overlap     share of its tokens that the same gamma and scale keep at the reference width
    largest     share of its tokens among the k tokens with the largest kernel diagonal. If gamma is too small, log det
                is linear, and the selection keeps these tokens
    objective   trace objective / mean trace objective of random subsets
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
NUM_RANDOM = 8  # random subsets of each image


def embedded_tokens(num_tokens: int, width: int, seed: int) -> Tensor:
    """The synthetic image of `seed`, float32 [N, D]. Its latent tokens are the same at every width."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, RANK + 1).rsqrt()
    latent = torch.randn(num_tokens, RANK, generator=generator) * spectrum
    latent[:, 0] += 1.0  # the direction that all tokens of an image share
    latent = latent * torch.exp(0.4 * torch.randn(num_tokens, 1, generator=generator))
    # The embedding and its noise have a generator of their own: they differ between widths, the latent tokens do not.
    generator = torch.Generator().manual_seed(1_000_003 * seed + width)
    embedded = latent @ torch.randn(RANK, width, generator=generator) / RANK**0.5
    return embedded + 0.02 * torch.randn(num_tokens, width, generator=generator)


def compare_widths(
    *, seed: int, tokens: int, kept: int, widths: Sequence[int], gammas: Sequence[float], scales: Sequence[str]
) -> list[Row]:
    """One row for each width, scale and gamma on the image of `seed`. The reference is the last of `widths`."""
    chosen: dict[tuple[int, str, float], Tensor] = {}
    rows: list[Row] = []
    for width in reversed(widths):  # the reference first: every later width is compared with it
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
