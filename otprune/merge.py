"""Leftovers merged into the kept tokens, after any method that keeps tokens as they are.

Each token belongs to the kept token with the highest cosine, a kept one to itself. With the cluster S_c of a kept token
c, rows v and a weight w in [0, 1],

    v'_c = (1 - w) v_c + w * mean over i in S_c of v_i.

w = 1 is the barycentric projection of the plan that sends every token's mass to its nearest kept one (Peyre and Cuturi
2019, section 4): of all rows that k clusters can have, their means are nearest to the whole picture in the squared
distance. A merged row stays at the place of its kept token.

Shape suffixes: N visual tokens of one picture, D feature width, W row width, K kept tokens.
"""

import torch
from torch import Tensor

from otprune.kernel import compute_dtype


def merge_leftovers(rows_NW: Tensor, features_ND: Tensor, source_K: Tensor, weight: float) -> Tensor:
    """The rows [K, W] of the kept tokens, in the dtype of `rows_NW`, computed in float32 (float64 for float64).

    Args:
        rows_NW: what the language model reads of each token.
        features_ND: what the tokens are compared by.
        source_K: int64, the kept tokens.
        weight: in [0, 1]; 0 leaves the kept rows as they are.

    Raises:
        ValueError: on a weight outside [0, 1], or rows and features of different numbers.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    if len(rows_NW) != len(features_ND):
        raise ValueError(f"rows must be {len(features_ND)} as the features are, got {len(rows_NW)}")
    unit_ND = torch.nn.functional.normalize(features_ND.to(compute_dtype(features_ND)), dim=-1)
    cluster_N = (unit_ND @ unit_ND[source_K].T).argmax(dim=1)
    cluster_N[source_K] = torch.arange(len(source_K), device=source_K.device)
    rows_NW, dtype = rows_NW.to(compute_dtype(rows_NW)), rows_NW.dtype
    sums_KW = rows_NW.new_zeros(len(source_K), rows_NW.shape[1]).index_add_(0, cluster_N, rows_NW)
    means_KW = sums_KW / cluster_N.bincount(minlength=len(source_K))[:, None]
    return torch.lerp(rows_NW[source_K], means_KW, weight).to(dtype)


def merge_flops(num_visual: int, num_kept: int, width: int) -> int:
    """Multiply-adds of the cosines of one picture: N K D."""
    return num_visual * num_kept * width
