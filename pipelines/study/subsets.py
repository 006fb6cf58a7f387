"""Draws pools of subsets of one set of tokens, computes their values, and finds or extrapolates the best value.

tokens are float64 [N, D], subsets int64 [S, k], values float64 [S].
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from otprune.kernel import unit_columns

SUBSETS_AT_A_TIME = 8192  # bounds the memory of k x k blocks


def normal_tokens(num_tokens: int, width: int, seed: int) -> Tensor:
    """iid N(0, 1) float64 [N, D]."""
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_subsets(num_tokens: int, keep: int) -> Tensor:
    """Every subset of `keep` out of `num_tokens`, int64 [comb(N, k), k], each ascending."""
    flat = itertools.chain.from_iterable(itertools.combinations(range(num_tokens), keep))
    return torch.tensor(list(flat)).view(-1, keep)


def subsets_by_rank(keep: int, start: int, stop: int) -> Tensor:
    """The subsets of ranks start .. stop - 1, int64 [stop - start, k], each ascending. N tokens have comb(N, k) ranks.

    The ranks are those of the combinatorial number system (colexicographic order): the rank of c_1 < ... < c_k is the
    sum of comb(c_i, i). So c_k is the largest c with comb(c, k) <= rank, c_(k-1) the largest for the remaining rank,
    and so on. No list of all subsets is ever formed.
    """
    rank = torch.arange(start, stop)
    elements = []
    for size in range(keep, 0, -1):
        # table[i] = comb(size - 1 + i, size), up to the first value that no rank reaches.
        binomials = [math.comb(size - 1, size)]
        while binomials[-1] < stop:
            binomials.append(math.comb(size - 1 + len(binomials), size))
        table = torch.tensor(binomials)
        step = torch.searchsorted(table, rank, right=True) - 1
        rank = rank - table[step]
        elements.append(step + size - 1)
    return torch.stack(elements[::-1], dim=1)


def random_subsets(num_tokens: int, keep: int, count: int, seed: int) -> Tensor:
    """`count` independent uniform subsets, int64 [count, k], each ascending: the k largest of N uniform draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.rand(min(SUBSETS_AT_A_TIME, count - start), num_tokens, generator=generator).topk(keep).indices
        for start in range(0, count, SUBSETS_AT_A_TIME)
    ]
    return torch.cat(drawn).sort(dim=-1).values


def trace_of_subsets(tokens: Tensor, subsets: Tensor, *, centered: bool) -> Tensor:
    """q = ||V V_C^T||_* / sqrt(N k) of each subset [S], as `otprune.distance.trace_objective` for one set of tokens.

    The singular values are the roots of the eigenvalues of a k x k block of G G, with G = V V^T. So thousands of
    subsets share one N x N matrix. `centered` centres the tokens and the block.
    """
    tokens = tokens - tokens.mean(dim=0) if centered else tokens
    gram = tokens @ tokens.mT
    squared = gram @ gram
    values = []
    for chosen in subsets.split(SUBSETS_AT_A_TIME):
        block = squared[chosen[:, :, None], chosen[:, None, :]]
        if centered:  # the kept tokens are centred about their own mean as well
            block = block - block.mean(dim=1, keepdim=True)
            block = block - block.mean(dim=2, keepdim=True)
        values.append(torch.linalg.eigvalsh(block).clamp_min(0).sqrt().sum(-1))
    return torch.cat(values) / math.sqrt(len(tokens) * subsets.shape[1])


def surrogate_of_subsets(tokens: Tensor, subsets: Tensor, *, gamma: float) -> Tensor:
    """log det (I + gamma G G^T)_CC of each subset [S], which OTPrune maximises. G: Gram matrix of unit columns."""
    unit = unit_columns(tokens[None])[0]
    gram = unit @ unit.mT
    kernel = torch.eye(len(tokens), dtype=gram.dtype) + gamma * gram @ gram
    values = [torch.logdet(kernel[c[:, :, None], c[:, None, :]]) for c in subsets.split(SUBSETS_AT_A_TIME)]
    return torch.cat(values)


def expected_best(pool_q: Tensor, num_subsets: int) -> float:
    """The expected best of `num_subsets` normal draws with the pool's mean and standard deviation.

    The estimate is the 1 - 1/num_subsets quantile. At N >= 100, where values are close to normal, it lies within 1 % of
    the best of pools of 4,000 and 60,000 that were really drawn; at N = 20 it is up to 8 % off.
    """
    quantile = torch.special.ndtri(torch.tensor(1 - 1 / num_subsets, dtype=torch.float64))
    return float(pool_q.mean() + quantile * pool_q.std())


def best_by_swaps(value: Callable[[Tensor], Tensor], starts: Tensor, num_tokens: int) -> float:
    """The best value that steepest ascent reaches from any of `starts`; a step exchanges one kept for one other token.

    The result is a lower bound of the best of all subsets. Every step of every start costs k (N - k) values.
    """
    best = -math.inf
    for chosen in starts:
        current = float(value(chosen[None])[0])
        while True:
            neighbours = _swapped(chosen, num_tokens)
            values = value(neighbours)
            step = int(values.argmax())
            if float(values[step]) <= current * (
                1 + 1e-12
            ):  # rounding must not pass for a gain, or the loop is endless
                break
            chosen, current = neighbours[step], float(values[step])
        best = max(best, current)
    return best


def _swapped(chosen: Tensor, num_tokens: int) -> Tensor:
    """All subsets that differ from `chosen` [k] in one token: [k (N - k), k]."""
    others = torch.ones(num_tokens, dtype=torch.bool).index_fill(0, chosen, False).nonzero()[:, 0]
    swapped = chosen.repeat(len(chosen), len(others), 1)
    for position in range(len(chosen)):
        swapped[position, :, position] = others
    return swapped.flatten(0, 1)
