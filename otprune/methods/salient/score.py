"""SCoRe (CVPR 2026): a weighted k-centre, the token farthest from the picks times a power of its saliency.

    next pick = argmax over i of  min over the picks c of (1 - cos(v_i, v_c)) * s_i^beta,        beta = 0.8

The most salient token is the first pick. No code was found; the paper's formulas are all that this was written from.

Departures:
- Distances are between the projector's inputs where the family has them for each token, else between projected tokens.
- Towers without a class token: saliency is the energy of `saliency.py`.

O(N k D) time and O(N D) memory a picture, without an N x N matrix.

Shape suffixes: B pictures, N visual tokens, D feature width.
"""

from functools import partial

import torch
from torch import Tensor

from otprune.choice import choose_tokens
from otprune.kernel import compute_dtype
from otprune.methods.base import Reducer
from otprune.methods.reduction import Reduced, Seen, Wish, keep_rows
from otprune.methods.salient.saliency import WISHES, saliency_of
from otprune.methods.salient.scope import compared
from otprune.methods.settings import Setting

DEFAULT_BETA = 0.8


def score(features_BND: Tensor, k: int, saliency_BN: Tensor, *, beta: float = DEFAULT_BETA) -> Tensor:
    """Token indices int64 [B, k] in the order picked; ties go to the lowest index.

    Args:
        features_BND: the tokens whose distances count, any floating type.
        k: number of tokens to keep, in [1, N].
        saliency_BN: at least 0; a factor that a picture's tokens share changes nothing.
        beta: exponent of the saliency, at least 0. 0 is the farthest-point rule alone, from token 0.

    Raises:
        ValueError: on saliency of another shape, or a negative beta.
    """
    if saliency_BN.shape != features_BND.shape[:2]:
        raise ValueError(f"saliency must be {list(features_BND.shape[:2])}, got {list(saliency_BN.shape)}")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    unit_BND = torch.nn.functional.normalize(features_BND.to(compute_dtype(features_BND)), dim=-1)
    weight_BN = saliency_BN.to(unit_BND.dtype) ** beta
    picture_B = torch.arange(len(unit_BND), device=unit_BND.device)
    picks_BK = torch.empty(len(unit_BND), k, dtype=torch.int64, device=unit_BND.device)
    distance_BN = torch.ones_like(weight_BN)
    for step in range(k):
        pick_B = (distance_BN * weight_BN).argmax(dim=-1)
        picks_BK[:, step] = pick_B
        # The lower bound keeps a token that equals a pick above the picked ones, whatever rounding does.
        far_BN = (1 - torch.einsum("bnd,bd->bn", unit_BND, unit_BND[picture_B, pick_B])).clamp_min(0)
        distance_BN = far_BN if step == 0 else torch.minimum(distance_BN, far_BN)
        distance_BN.scatter_(1, picks_BK[:, : step + 1], -torch.inf)
    return picks_BK


def _reduce(seen: Seen, k: int, *, beta: float) -> list[list[Reduced]]:
    choose = partial(score, saliency_BN=saliency_of(seen), beta=beta)
    return [[reduced] for reduced in keep_rows(seen.features, choose_tokens(choose, compared(seen), k, trusted=True))]


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds: N D for the distances to each pick."""
    return num_tokens * width * kept


METHOD = Reducer(
    name="score",
    reduce=_reduce,
    cost=_cost,
    wishes=WISHES | frozenset[Wish](("patches",)),
    settings={
        "beta": Setting(
            meaning="exponent of the saliency; 0 is farthest points alone", kind="number", default=DEFAULT_BETA, low=0
        )
    },
)
