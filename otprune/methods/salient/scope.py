"""SCOPE (NeurIPS 2025, arXiv 2510.24214): the tokens that cover the others best, weighted by their saliency.

With the cosines c_ij of the tokens and a set C of picks, a token i that is not picked scores

    sum over j of max(0, c_ij - b_j) * s_i^alpha,        b_j = max(0, max over the picks of c_j)

and the token with the highest score is picked next. alpha is 1 in the released code.

Departures:
- The release compares the projector's input, and so does this method where the family has it for each token; else it
  compares projected tokens.
- Towers without a class token, which the paper does not have: saliency is the energy of `saliency.py`.
- Cosines are float32 (float64 for float64); a zero token has cosine 0 to everything instead of NaN.

O(N^2 (D + k)) time. Beyond `kernel.WHOLE_KERNEL` tokens, cosines are computed in blocks whenever they are needed.

Shape suffixes: B pictures, N visual tokens, D feature width.
"""

from functools import partial

import torch
from torch import Tensor

from otprune.choice import choose_tokens
from otprune.kernel import compute_dtype, forms_kernel, gram
from otprune.methods.base import Reducer
from otprune.methods.reduction import Reduced, Seen, Wish, keep_rows
from otprune.methods.salient.saliency import WISHES, saliency_of
from otprune.methods.settings import Setting

BLOCK = 512  # columns of cosines that are held at once of a long picture


def scope(features_BND: Tensor, k: int, saliency_BN: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Token indices int64 [B, k] in the order picked; ties go to the lowest index.

    Args:
        features_BND: the tokens that are compared, any floating type.
        k: number of tokens to keep, in [1, N].
        saliency_BN: at least 0; a factor that a picture's tokens share changes nothing.
        alpha: exponent of the saliency, at least 0; 0 is coverage alone.

    Raises:
        ValueError: on saliency of another shape, or a negative alpha.
    """
    if saliency_BN.shape != features_BND.shape[:2]:
        raise ValueError(f"saliency must be {list(features_BND.shape[:2])}, got {list(saliency_BN.shape)}")
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}")
    weight_BN = saliency_BN.to(compute_dtype(features_BND)) ** alpha
    return torch.stack([_picks(*picture, k) for picture in zip(features_BND, weight_BN, strict=True)])


def _picks(features_ND: Tensor, weight_N: Tensor, k: int) -> Tensor:
    """The picks int64 [k] of one picture.

    The gains sum_j max(0, c_ij - b_j) are kept up to date: a pick changes them by the tokens j alone that it covers
    better than the picks before it, which soon are few.
    """
    unit_ND = torch.nn.functional.normalize(features_ND.to(weight_N.dtype), dim=-1)
    whole_NN = gram(unit_ND[None])[0] if forms_kernel(len(unit_ND)) else None
    covered_N = torch.zeros_like(weight_N)
    gain_N = _clipped_sums(unit_ND, whole_NN, covered_N, torch.arange(len(unit_ND), device=unit_ND.device))
    is_picked_N = torch.zeros_like(weight_N, dtype=torch.bool)
    picks_K = torch.empty(k, dtype=torch.int64, device=unit_ND.device)
    for step in range(k):
        pick = (gain_N * weight_N).masked_fill(is_picked_N, -torch.inf).argmax()
        picks_K[step] = pick
        is_picked_N[pick] = True
        cosine_N = unit_ND @ unit_ND[pick] if whole_NN is None else whole_NN[pick]
        better = (cosine_N > covered_N).nonzero()[:, 0]
        if step + 1 < k and len(better):
            before_N = _clipped_sums(unit_ND, whole_NN, covered_N, better)
            covered_N = torch.maximum(covered_N, cosine_N)
            gain_N += _clipped_sums(unit_ND, whole_NN, covered_N, better) - before_N
    return picks_K


def _clipped_sums(unit_ND: Tensor, whole_NN: Tensor | None, covered_N: Tensor, tokens_J: Tensor) -> Tensor:
    """sum over j of `tokens_J` of max(0, c_ij - covered_j), for every i: [N]."""
    sums_N = torch.zeros_like(covered_N)
    for block in tokens_J.split(BLOCK):
        cosine_NJ = unit_ND @ unit_ND[block].T if whole_NN is None else whole_NN[:, block]
        sums_N += (cosine_NJ - covered_N[block]).clamp_min(0).sum(dim=-1)
    return sums_N


def compared(seen: Seen) -> Tensor:
    """The tokens whose cosines count: the projector's input where the encoder has it, else projected tokens."""
    return seen.features if seen.patches is None else seen.patches


def _reduce(seen: Seen, k: int, *, alpha: float) -> list[list[Reduced]]:
    choose = partial(scope, saliency_BN=saliency_of(seen), alpha=alpha)
    return [[reduced] for reduced in keep_rows(seen.features, choose_tokens(choose, compared(seen), k, trusted=True))]


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds: N^2 D for the cosines. Long pictures compute them anew for what each pick covers: at least once
    more for every token, and counted once."""
    return num_tokens**2 * width * (1 if forms_kernel(num_tokens) else 3)


METHOD = Reducer(
    name="scope",
    reduce=_reduce,
    cost=_cost,
    wishes=WISHES | frozenset[Wish](("patches",)),
    settings={
        "alpha": Setting(meaning="exponent of the saliency; 0 is coverage alone", kind="number", default=1.0, low=0)
    },
)
