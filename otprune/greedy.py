"""Greedy log-determinant subset selection, batched over images.

Each pick adds the token with the largest conditional variance given the picks so far (Chen et al. 2018, Algorithm 1;
OTPrune Algorithm 1). For a kernel K = ridge I + F F^T, log det (K_SS / ridge) is monotone and submodular, so the greedy
set reaches at least 1 - 1/e of the best one (paper Eq. 9).

Shape suffixes: B images, N visual tokens, R columns of the factor, K kept tokens.

Departures:
- Picked tokens are masked (Algorithm 1 says so, the released code does not and refills duplicates afterwards): constant
  or duplicate tokens still give k distinct ones. test_degenerate_tokens_still_give_distinct_picks
- The ridge is kept apart: `excess` is K_ii - ridge minus what the picks explain, so that a small gamma does not drown
  in the rounding of 1 + small and no pivot sqrt(ridge + excess) is below its floor. test_a_tiny_gamma_keeps_its_order
- Cholesky columns are float32 (the released code stores them in the model's float16).
"""

import math

import numpy as np
import torch
from torch import Tensor

from otprune.kernel import fused, gram

AHEAD = 32  # rows of F F^T that are computed at once, at most


def greedy_logdet(factor_BNR: Tensor, ridge_B: Tensor, k: int, *, symmetric: bool = False) -> Tensor:
    """Tokens int64 [B, k], in the order picked, that greedily maximise log det K_SS for K = ridge I + F F^T.

    Exact ties go to the lowest index. A ridge of 0 makes it the MAP of a plain DPP; once the rank is used up, every
    token left ties with the others. `symmetric` promises that F = F^T, whose products a CPU forms faster.
    """
    if factor_BNR.device.type == "cpu":
        images = zip(factor_BNR, ridge_B.tolist(), strict=True)
        picks = [_greedy_image(factor_NR, ridge, k, symmetric) for factor_NR, ridge in images]
        return torch.from_numpy(np.stack(picks)) if picks else torch.empty(0, k, dtype=torch.int64)
    return greedy_from_kernel(gram(factor_BNR), ridge_B, k)


def _greedy_image(factor_NR: Tensor, ridge: float, k: int, symmetric: bool) -> np.ndarray:
    """One image on a CPU, without forming F F^T: O(N (R + k)) a pick and O(N (R + k)) memory.

    Vectors are numpy's, whose calls cost a fifth of torch's.
    """
    factor = factor_NR.numpy()
    columns = np.empty((k, len(factor)), factor.dtype)
    excess = np.einsum("nr,nr->n", factor, factor)
    floor = _noise(factor_NR.dtype) * (ridge + excess)
    squares = np.empty_like(excess)
    picks = np.empty(k, dtype=np.int64)
    rows = _RowsAhead(factor, factor_NR if symmetric else factor_NR.T)

    for step, column in enumerate(columns):
        pick = int(excess.argmax())
        picks[step] = pick
        np.subtract(rows.take(pick, excess, k - step), columns[:step, pick] @ columns[:step], out=column)
        variance = ridge + float(excess[pick])
        column /= math.sqrt(variance) if variance > floor[pick] else math.inf
        np.multiply(column, column, out=squares)
        excess -= squares
        excess[pick] = -np.inf  # a token is picked once
    return picks


class _RowsAhead:
    """Rows of F F^T, several at a time: those of the tokens with the largest conditional variance.

    Most of them are picked soon, so that F is read less often: 2 or 3 times for 25 of 256 tokens or 56 of 576, 9 to 35
    times for 282 of 2880.
    """

    def __init__(self, factor: np.ndarray, factor_RN: Tensor) -> None:
        self.factor, self.factor_RN = factor, factor_RN
        self.blocks: list[np.ndarray] = []
        self.place = np.full(len(factor), -1)  # of a token's row in the blocks, each counted as AHEAD rows
        self.known = np.zeros(len(factor), factor.dtype)  # -inf where the row is computed already

    def take(self, pick: int, excess: np.ndarray, num_left: int) -> np.ndarray:
        """The row of `pick`, where `num_left` tokens are still to be picked, this one included."""
        if self.place[pick] < 0:
            candidates = excess + self.known
            candidates[pick] = np.inf  # it ties, perhaps, with more than are computed
            num_ahead = min(AHEAD, num_left // 2 + 4, len(candidates))
            ahead = candidates.argpartition(-num_ahead)[-num_ahead:]
            self.place[ahead] = AHEAD * len(self.blocks) + np.arange(num_ahead)
            self.known[ahead] = -np.inf
            wanted = torch.from_numpy(self.factor.take(ahead, axis=0))
            self.blocks.append((wanted @ self.factor_RN).numpy())
        block, row = divmod(int(self.place[pick]), AHEAD)
        return self.blocks[block][row]


def greedy_from_kernel(excess_BNN: Tensor, ridge_B: Tensor, k: int) -> Tensor:
    """The same from F F^T itself, for a whole batch at a time: O(N k) a pick and no host synchronisation."""
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
        seen_BN = torch.einsum("bsn,bs->bn", chol_BKN[:, :step], chol_BKN[image_B, :step, pick_B])
        column_BN = (excess_BNN[image_B, pick_B] - seen_BN) / pivot_B[:, None]
        chol_BKN[:, step] = column_BN
        excess_BN -= column_BN.square()
        excess_BN[image_B, pick_B] = -torch.inf  # a token is picked once
    return picks_BK


def _noise(dtype: torch.dtype) -> float:
    """Below this share of its own variance a token has nothing left but rounding, which dividing by it would grow."""
    return 8 * torch.finfo(dtype).eps
