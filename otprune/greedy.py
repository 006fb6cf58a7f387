"""Greedy log-determinant subset selection, batched over images.

Each step picks the token with the largest conditional variance given the earlier picks (Chen et al. 2018, Algorithm 1;
OTPrune Algorithm 1). For a kernel K = ridge I + F F^T, log det (K_SS / ridge) is monotone and submodular, so the greedy
set reaches at least 1 - 1/e of the maximum (paper Eq. 9).

Both implementations extend a Cholesky factor by one column a pick, and subtract the square of that column from the
conditional variances. The CPU version works on one image and computes rows of F F^T when it needs them. The batched
version takes all of F F^T and never waits for the device.

Shape suffixes: B images, N visual tokens, R columns of the factor, K kept tokens.

Departures:
- Picked tokens are masked, as Algorithm 1 says; the released code does not mask them and refills duplicates afterwards.
  Constant or duplicate tokens therefore still give k distinct picks. test_degenerate_tokens_still_give_distinct_picks
- The ridge is stored apart from the conditional variance: `excess` is K_ii - ridge minus what the picks explain. A
  small gamma therefore survives the rounding of 1 + small, and no pivot sqrt(ridge + excess) falls below its floor.
  test_a_tiny_gamma_keeps_its_order
- Cholesky columns are float32; the released code stores them in the model's float16.
"""

import math

import numpy as np
import torch
from torch import Tensor

from otprune.kernel import fused, gram

AHEAD = 32  # the most rows of F F^T that one matrix product computes


def greedy_logdet(factor_BNR: Tensor, ridge_B: Tensor, k: int, *, symmetric: bool = False) -> Tensor:
    """Token indices int64 [B, k], in the order picked, that greedily maximise log det K_SS for K = ridge I + F F^T.

    Exact ties go to the lowest index. With a ridge of 0 the result is the greedy MAP of a plain DPP; once the picks
    have used up the rank of F, all remaining tokens tie.

    Args:
        factor_BNR: F, float32 or float64.
        ridge_B: the ridge of each image, at least 0.
        k: number of picks, in [1, N].
        symmetric: the caller promises that F = F^T. A CPU multiplies by F faster than by its transpose.
    """
    if factor_BNR.device.type == "cpu":
        images = zip(factor_BNR, ridge_B.tolist(), strict=True)
        picks = [_greedy_image(factor_NR, ridge, k, symmetric) for factor_NR, ridge in images]
        return torch.from_numpy(np.stack(picks)) if picks else torch.empty(0, k, dtype=torch.int64)
    return greedy_from_kernel(gram(factor_BNR), ridge_B, k)


def _greedy_image(factor_NR: Tensor, ridge: float, k: int, symmetric: bool) -> np.ndarray:
    """The picks of one image on a CPU, without forming F F^T: O(N (R + k)) a pick and O(N (R + k)) memory.

    The vector operations are numpy's, because a numpy call costs a fifth of a torch call.
    """
    factor = factor_NR.numpy()
    columns = np.empty((k, len(factor)), factor.dtype)
    excess = np.einsum("nr,nr->n", factor, factor)
    floor = _noise(factor_NR.dtype) * (ridge + excess)
    squares = np.empty_like(excess)
    picks = np.empty(k, dtype=np.int64)
    rows = _RowsAhead(factor, factor_NR if symmetric else factor_NR.T)

    # Row s of `columns` is the Cholesky column of pick s: rows are contiguous in memory, and each step fills one.
    for step, column in enumerate(columns):
        pick = int(excess.argmax())
        picks[step] = pick
        np.subtract(rows.take(pick, excess, k - step), columns[:step, pick] @ columns[:step], out=column)
        variance = ridge + float(excess[pick])
        # A variance below the floor is rounding: dividing by infinity zeroes the column instead of amplifying it.
        column /= math.sqrt(variance) if variance > floor[pick] else math.inf
        np.multiply(column, column, out=squares)
        excess -= squares
        excess[pick] = -np.inf  # a token is picked once
    return picks


class _RowsAhead:
    """Computes rows of F F^T in blocks: the picked token's row and those of the likeliest next picks.

    The likeliest next picks are the tokens with the largest conditional variance. Most of them are picked soon, so the
    whole of F is read once a block instead of once a pick: 2 or 3 times for 25 of 256 tokens or 56 of 576, 9 to 35
    times for 282 of 2880.
    """

    def __init__(self, factor: np.ndarray, factor_RN: Tensor) -> None:
        self.factor, self.factor_RN = factor, factor_RN
        self.blocks: list[np.ndarray] = []
        # AHEAD * block + row in the block, for each token whose row is computed; -1 for the others.
        self.row_index = np.full(len(factor), -1)
        self.penalty = np.zeros(len(factor), factor.dtype)  # -inf for tokens whose row is computed, 0 for the others

    def take(self, pick: int, excess: np.ndarray, num_left: int) -> np.ndarray:
        """The row [N] of `pick`; `num_left` is the number of picks still to make, `pick` included."""
        if self.row_index[pick] < 0:
            candidates = excess + self.penalty
            # More tokens than fit in the block may tie with `pick`; the infinity makes sure that the block has `pick`.
            candidates[pick] = np.inf
            # Near the end few rows computed ahead would be used: a block has at most 4 rows more than half of the picks
            # that are left.
            num_ahead = min(AHEAD, num_left // 2 + 4, len(candidates))
            ahead = candidates.argpartition(-num_ahead)[-num_ahead:]
            self.row_index[ahead] = AHEAD * len(self.blocks) + np.arange(num_ahead)
            self.penalty[ahead] = -np.inf
            wanted = torch.from_numpy(self.factor.take(ahead, axis=0))
            self.blocks.append((wanted @ self.factor_RN).numpy())
        block, row = divmod(int(self.row_index[pick]), AHEAD)
        return self.blocks[block][row]


def greedy_from_kernel(excess_BNN: Tensor, ridge_B: Tensor, k: int) -> Tensor:
    """The picks int64 [B, k] of `greedy_logdet`, from F F^T [B, N, N] instead of F.

    The whole batch advances together: O(N k) a pick and an image, without host synchronisation.
    """
    if module := fused(excess_BNN):
        return module.greedy_from_kernel(excess_BNN, ridge_B, k)
    B, N, _ = excess_BNN.shape
    excess_BN = excess_BNN.diagonal(dim1=-2, dim2=-1).clone()
    floor_BN = _noise(excess_BNN.dtype) * (ridge_B[:, None] + excess_BN)
    chol_BKN = excess_BNN.new_zeros(B, k, N)
    picks_BK = torch.empty(B, k, dtype=torch.int64, device=excess_BNN.device)
    image_B = torch.arange(B, device=excess_BNN.device)

    for step in range(k):
        pick_B = excess_BN.argmax(dim=-1)
        picks_BK[:, step] = pick_B
        variance_B = ridge_B + excess_BN[image_B, pick_B]
        pivot_B = torch.where(variance_B > floor_BN[image_B, pick_B], variance_B.sqrt(), torch.inf)
        explained_BN = torch.einsum("bsn,bs->bn", chol_BKN[:, :step], chol_BKN[image_B, :step, pick_B])
        column_BN = (excess_BNN[image_B, pick_B] - explained_BN) / pivot_B[:, None]
        chol_BKN[:, step] = column_BN
        excess_BN -= column_BN.square()
        excess_BN[image_B, pick_B] = -torch.inf  # a token is picked once
    return picks_BK


def _noise(dtype: torch.dtype) -> float:
    """The share of a token's own variance below which its conditional variance is only rounding error."""
    return 8 * torch.finfo(dtype).eps
