"""How salient a visual token is: the class token's attention where the vision tower has one, else an energy.

    attention   a_i = mean over heads of softmax(q_class k^T / sqrt(width of a head))_i, in the layer that makes the
                features (VisionZip, SCOPE and SCoRe read it there)
    energy      e_i = |v_i|^2, of tokens whose columns are centred and have length 1 over the picture: a token's share
                of the picture's variance, which needs no attention

Shape suffixes: B pictures, N visual tokens, D feature width.
"""

import torch
from torch import Tensor

from otprune.kernel import compute_dtype, unit_columns
from otprune.methods.reduction import Seen, Wish

WISHES = frozenset[Wish](("saliency",))


def saliency_of(seen: Seen) -> Tensor:
    """[B, N], at least 0, with a mean of 1 in each picture."""
    measured = energy(seen.features) if seen.saliency is None else seen.saliency
    return normalised(measured.to(compute_dtype(seen.features)))


def energy(features_BND: Tensor) -> Tensor:
    """The share [B, N] of each token in its picture's variance, times a factor that all tokens share."""
    return unit_columns(features_BND, centered=True).square().sum(dim=-1)


def normalised(saliency_BN: Tensor) -> Tensor:
    """The saliency divided by its mean over the picture; 1 everywhere if nothing is salient."""
    mean_B1 = saliency_BN.mean(dim=-1, keepdim=True)
    return torch.where(mean_B1 > 0, saliency_BN / mean_B1.clamp_min(torch.finfo(saliency_BN.dtype).tiny), 1)
