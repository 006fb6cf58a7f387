"""Greedy log-determinant subset selection, batched over images.

Each pick adds the token with the largest conditional variance given the picks so far (Chen et al. 2018, Algorithm 1;
OTPrune Algorithm 1). For a kernel K = I + F F^T the gain log det K_SS is monotone and submodular, so the greedy set
reaches at least 1 - 1/e of the best one (paper Eq. 9).

Shape suffixes: B images, N visual tokens, R columns of the factor, K kept tokens.

Departures:
- Picked tokens are masked (Algorithm 1 says so, the released code does not and refills duplicates afterwards): constant
  or duplicate tokens still give k distinct ones. test_degenerate_tokens_still_give_distinct_picks
- The 1 of the diagonal is kept apart: `excess` is K_ii - 1 minus what the picks explain, so that a small gamma does not
  drown in the rounding of 1 + small, and the pivot sqrt(1 + excess) is never below 1. test_a_tiny_gamma_keeps_its_order
- Cholesky columns are float32 (the released code stores them in the model's float16).
"""

import torch
from torch import Tensor


def greedy_logdet(factor_BNR: Tensor, k: int) -> Tensor:
    """Tokens int64 [B, k], in the order picked, that greedily maximise log det K_SS for K = I + F F^T.

    Exact ties go to the lowest index. K is never formed: a pick costs one product F f_j and one with the Cholesky
    columns so far, O(N (R + k)), all on the device and without a host synchronisation.
    """
    B, N, _ = factor_BNR.shape
    excess_BN = factor_BNR.square().sum(dim=-1)
    chol_BKN = factor_BNR.new_zeros(B, k, N)
    picks_BK = torch.empty(B, k, dtype=torch.int64, device=factor_BNR.device)
    image_B = torch.arange(B, device=factor_BNR.device)

    for step in range(k):
        pick_B = excess_BN.argmax(dim=-1)
        picks_BK[:, step] = pick_B
        pivot_B = (1 + excess_BN[image_B, pick_B].clamp_min(0)).sqrt()
        row_BN = torch.einsum("bnr,br->bn", factor_BNR, factor_BNR[image_B, pick_B])
        seen_BN = torch.einsum("bsn,bs->bn", chol_BKN[:, :step], chol_BKN[image_B, :step, pick_B])
        column_BN = (row_BN - seen_BN) / pivot_B[:, None]
        chol_BKN[:, step] = column_BN
        excess_BN -= column_BN.square()
        excess_BN[image_B, pick_B] = -torch.inf  # a token is picked once
    return picks_BK
