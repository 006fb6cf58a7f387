"""Greedy subset selection, batched over images: log-determinant and max-min.

Log-determinant: each step picks the token with the largest conditional variance given the earlier picks (Chen et al.
2018, Algorithm 1; OTPrune Algorithm 1). For a kernel K = ridge I + F F^T, log det (K_SS / ridge) is monotone and
submodular, so the greedy set reaches at least 1 - 1/e of the maximum (paper Eq. 9).

Every implementation extends a Cholesky factor by one column a pick, and subtracts the square of that column from the
conditional variances. The CPU version works on one image and computes rows of F F^T when it needs them. The batched
versions never wait for the device: one takes all of F F^T, the other computes the row of every pick.

Max-min: each step picks the token farthest from the picks, from rows of cosines (`greedy_max_min`).

No function forms an N x N matrix for more tokens than `kernel.forms_kernel` allows.

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
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from otprune import kernel
from otprune.kernel import forms_kernel, fused, gram, product_diagonal

AHEAD = 32  # the most rows of F F^T that one matrix product computes
AHEAD_OF_MANY = 64  # the same for more than kernel.WHOLE_KERNEL tokens, where reading F costs more than unused rows


def greedy_logdet(
    factor_BNR: Tensor, ridge_B: Tensor, k: int, *, symmetric: bool = False, middle_BRR: Tensor | None = None
) -> Tensor:
    """Token indices int64 [B, k], in the order picked, that greedily maximise log det K_SS for K = ridge I + F F^T.

    With `middle_BRR`, K = ridge I + F M F^T. Exact ties go to the lowest index. With a ridge of 0 the result is the
    greedy MAP of a plain DPP; once the picks have used up the rank of F, all remaining tokens tie.

    Args:
        factor_BNR: F, float32 or float64.
        ridge_B: the ridge of each image, at least 0.
        k: number of picks, in [1, N].
        symmetric: the caller promises that F = F^T. A CPU multiplies by F faster than by its transpose.
        middle_BRR: M, symmetric and positive semidefinite; None is the identity.
    """
    if factor_BNR.device.type == "cpu":
        middles = [None] * len(factor_BNR) if middle_BRR is None else middle_BRR
        images = zip(factor_BNR, middles, ridge_B.tolist(), strict=True)
        return _stack([_greedy_image(factor_NR, M, ridge, k, symmetric)[0] for factor_NR, M, ridge in images], k)
    if middle_BRR is None and forms_kernel(factor_BNR.shape[1]):
        return greedy_from_kernel(gram(factor_BNR), ridge_B, k)
    return greedy_from_rows(factor_BNR, middle_BRR, ridge_B, k)


def greedy_gains(factor_BNR: Tensor, ridge_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The picks int64 [B, k] of `greedy_logdet`, and of each its conditional variance beyond the ridge [B, k].

    log det K_SS grows by log(ridge + that variance) with each pick. O(N (R + k)) a pick and an image.
    """
    if factor_BNR.device.type == "cpu":
        images = zip(factor_BNR, ridge_B.tolist(), strict=True)
        done = [_greedy_image(factor_NR, None, ridge, k, False) for factor_NR, ridge in images]
        excess = [torch.from_numpy(excess) for _, excess in done]
        return _stack([picks for picks, _ in done], k), torch.stack(excess) if excess else factor_BNR.new_empty(0, k)
    excess_BN = torch.linalg.vector_norm(factor_BNR, dim=-1).square()
    return _greedy_batch(excess_BN, _rows_of(factor_BNR, None), ridge_B, k)


def _stack(picks: list[np.ndarray], k: int) -> Tensor:
    return torch.from_numpy(np.stack(picks)) if picks else torch.empty(0, k, dtype=torch.int64)


def _greedy_image(
    factor_NR: Tensor, middle_RR: Tensor | None, ridge: float, k: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The picks [k] of one image on a CPU and what each adds to the ridge [k], without forming F F^T.

    O(N (R + k)) a pick and O(N (R + k)) memory.

    The vector operations are numpy's, because a numpy call costs a fifth of a torch call.
    """
    factor = factor_NR.numpy()
    columns = np.empty((k, len(factor)), factor.dtype)
    if middle_RR is None:
        excess = np.einsum("nr,nr->n", factor, factor)
    else:
        excess = product_diagonal(factor_NR[None], middle_RR[None])[0].numpy()
    floor = _noise(factor_NR.dtype) * (ridge + excess)
    squares = np.empty_like(excess)
    picks, taken = np.empty(k, dtype=np.int64), np.empty(k, factor.dtype)
    rows = _RowsAhead(factor, factor_NR if symmetric else factor_NR.T, middle_RR, columns)

    # Row s of `columns` is the Cholesky column of pick s: rows are contiguous in memory, and each step fills one.
    for step, column in enumerate(columns):
        pick = int(excess.argmax())
        picks[step], taken[step] = pick, excess[pick]
        row, start = rows.take(pick, excess, k - step)
        np.subtract(row, columns[start:step, pick] @ columns[start:step], out=column)
        variance = ridge + float(excess[pick])
        # A variance below the floor is rounding: dividing by infinity zeroes the column instead of amplifying it.
        column /= math.sqrt(variance) if variance > floor[pick] else math.inf
        np.multiply(column, column, out=squares)
        excess -= squares
        excess[pick] = -np.inf  # a token is picked once
    return picks, taken


class _RowsAhead:
    """Computes rows of F F^T in blocks: the picked token's row and those of the likeliest next picks.

    The likeliest next picks are the tokens with the largest conditional variance. Most of them are picked soon, so the
    whole of F is read once a block instead of once a pick: 2 or 3 times for 25 of 256 tokens or 56 of 576, 9 to 35
    times for 282 of 2880.

    For more than kernel.WHOLE_KERNEL tokens, reading all earlier Cholesky columns at every pick would take most of the
    time. A block then also subtracts what the `columns` [K, N] so far explain, in one more matrix product. The memory
    is bounded there: the oldest blocks are dropped, and their rows computed again if they are picked after all.
    """

    def __init__(
        self,
        factor: np.ndarray,
        factor_RN: Tensor,
        middle_RR: Tensor | None = None,
        columns: np.ndarray | None = None,
    ) -> None:
        self.factor, self.factor_RN, self.middle_RR = factor, factor_RN, middle_RR
        num_tokens = len(factor)
        self.has_many = not forms_kernel(num_tokens)
        self.columns = columns if self.has_many else None
        self.size = AHEAD_OF_MANY if self.has_many else AHEAD
        self.max_blocks = max(2, kernel.WHOLE_KERNEL**2 // (num_tokens * self.size)) if self.has_many else num_tokens
        self.blocks: list[np.ndarray] = []
        self.starts: list[int] = []  # for each block, the number of Cholesky columns that it has subtracted
        # size * block + row in the block, for each token whose row is computed; -1 for the others.
        self.row_index = np.full(num_tokens, -1)
        self.penalty = np.zeros(num_tokens, factor.dtype)  # -inf for tokens whose row is computed, 0 for the others

    def take(self, pick: int, excess: np.ndarray, num_left: int) -> tuple[np.ndarray, int]:
        """The row [N] of `pick`, and the number of Cholesky columns whose share is subtracted from it.

        `num_left` is the number of picks still to make, `pick` included.
        """
        if self.row_index[pick] < 0:
            candidates = excess + self.penalty
            # More tokens than fit in the block may tie with `pick`; the infinity makes sure that the block has `pick`.
            candidates[pick] = np.inf
            # Near the end few rows computed ahead would be used: a block has at most 4 rows more than half of the picks
            # that are left.
            num_ahead = min(self.size, num_left // 2 + 4, len(candidates))
            ahead = candidates.argpartition(-num_ahead)[-num_ahead:]
            self.row_index[ahead] = self.size * len(self.blocks) + np.arange(num_ahead)
            self.penalty[ahead] = -np.inf
            num_columns = 0 if self.columns is None else len(self.columns) - num_left
            self.blocks.append(self._compute(ahead, num_columns))
            self.starts.append(num_columns)
            self._drop(len(self.blocks) - 1 - self.max_blocks)
        block, row = divmod(int(self.row_index[pick]), self.size)
        return self.blocks[block][row], self.starts[block]

    def _compute(self, tokens: np.ndarray, num_columns: int) -> np.ndarray:
        """The rows [tokens, N] of `tokens`, less what the first `num_columns` Cholesky columns explain."""
        wanted = torch.from_numpy(self.factor.take(tokens, axis=0))
        if self.middle_RR is not None:
            wanted = wanted @ self.middle_RR
        if not self.has_many:
            return (wanted @ self.factor_RN).numpy()
        # A tall product with few columns takes two thirds of the time of a flat one with few rows.
        block = (self.factor_RN.T @ wanted.T).T.contiguous()
        if num_columns and self.columns is not None:
            columns = self.columns[:num_columns]
            block.addmm_(torch.from_numpy(columns[:, tokens]).T, torch.from_numpy(columns), alpha=-1)
        return block.numpy()

    def _drop(self, block: int) -> None:
        if block < 0:
            return
        is_dropped = self.row_index // self.size == block
        self.row_index[is_dropped] = -1
        self.penalty[is_dropped] = 0
        self.blocks[block] = self.blocks[block][:0].copy()


def greedy_from_kernel(excess_BNN: Tensor, ridge_B: Tensor, k: int) -> Tensor:
    """The picks int64 [B, k] of `greedy_logdet`, from F F^T [B, N, N] instead of F.

    The whole batch advances together: O(N k) a pick and an image, without host synchronisation.
    """
    if module := fused(excess_BNN):
        return module.greedy_from_kernel(excess_BNN, ridge_B, k)
    image_B = torch.arange(len(excess_BNN), device=excess_BNN.device)
    excess_BN = excess_BNN.diagonal(dim1=-2, dim2=-1).clone()
    return _greedy_batch(excess_BN, lambda pick_B: excess_BNN[image_B, pick_B], ridge_B, k)[0]


def greedy_from_rows(factor_BNR: Tensor, middle_BRR: Tensor | None, ridge_B: Tensor, k: int) -> Tensor:
    """The picks int64 [B, k] of `greedy_logdet`, from a row of F M F^T computed for every pick.

    The whole batch advances together: O(N (R + k)) a pick and an image, O(N (R + k)) memory an image, without host
    synchronisation.
    """
    if middle_BRR is None:
        excess_BN = torch.linalg.vector_norm(factor_BNR, dim=-1).square()
    else:
        excess_BN = product_diagonal(factor_BNR, middle_BRR)
    return _greedy_batch(excess_BN, _rows_of(factor_BNR, middle_BRR), ridge_B, k)[0]


def _rows_of(factor_BNR: Tensor, middle_BRR: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that gives the rows [B, N] of F M F^T of the tokens int64 [B]."""
    image_B = torch.arange(len(factor_BNR), device=factor_BNR.device)

    def row_of(pick_B: Tensor) -> Tensor:
        row_BR = factor_BNR[image_B, pick_B]
        if middle_BRR is not None:
            row_BR = torch.einsum("br,brs->bs", row_BR, middle_BRR)
        return torch.einsum("bnr,br->bn", factor_BNR, row_BR)

    return row_of


def _greedy_batch(
    excess_BN: Tensor, row_of: Callable[[Tensor], Tensor], ridge_B: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The picks [B, k] and what each adds to the ridge [B, k].

    From the diagonal of K - ridge I, which is overwritten, and a function that gives the rows of picks.
    """
    B, N = excess_BN.shape
    floor_BN = _noise(excess_BN.dtype) * (ridge_B[:, None] + excess_BN)
    chol_BKN = excess_BN.new_zeros(B, k, N)
    picks_BK = torch.empty(B, k, dtype=torch.int64, device=excess_BN.device)
    taken_BK = excess_BN.new_empty(B, k)
    image_B = torch.arange(B, device=excess_BN.device)

    for step in range(k):
        pick_B = excess_BN.argmax(dim=-1)
        picks_BK[:, step], taken_BK[:, step] = pick_B, excess_BN[image_B, pick_B]
        variance_B = ridge_B + excess_BN[image_B, pick_B]
        pivot_B = torch.where(variance_B > floor_BN[image_B, pick_B], variance_B.sqrt(), torch.inf)
        explained_BN = torch.einsum("bsn,bs->bn", chol_BKN[:, :step], chol_BKN[image_B, :step, pick_B])
        column_BN = (row_of(pick_B) - explained_BN) / pivot_B[:, None]
        chol_BKN[:, step] = column_BN
        excess_BN -= column_BN.square()
        excess_BN[image_B, pick_B] = -torch.inf  # a token is picked once
    return picks_BK, taken_BK


def greedy_max_min(unit_BNR: Tensor, nearest_BN: Tensor, k: int) -> Tensor:
    """Token indices int64 [B, k], in the order picked: each pick is the token farthest from the earlier picks.

    The distance of two tokens is 1 minus their inner product; its rows are computed for the picks, in O(N R) memory.
    Exact ties go to the lowest index. Without host synchronisation on a GPU.

    Args:
        unit_BNR: tokens of length 1 or 0.
        nearest_BN: the distance of each token to its nearest neighbour. The first pick is the token with the largest.
    """
    if unit_BNR.device.type == "cpu":
        images = zip(unit_BNR, nearest_BN.numpy(), strict=True)
        return _stack([_max_min_image(unit_NR, nearest, k) for unit_NR, nearest in images], k)
    return _max_min_batch(unit_BNR, nearest_BN, k)


def _max_min_batch(unit_BNR: Tensor, nearest_BN: Tensor, k: int) -> Tensor:
    image_B = torch.arange(len(unit_BNR), device=unit_BNR.device)
    pick_B = nearest_BN.argmax(dim=-1)
    picks = [pick_B]
    nearest_BN = torch.full_like(nearest_BN, torch.inf)
    for _ in range(k - 1):
        distance_BN = 1 - torch.einsum("bnr,br->bn", unit_BNR, unit_BNR[image_B, pick_B])
        nearest_BN = torch.minimum(nearest_BN, distance_BN)
        nearest_BN[image_B, pick_B] = -torch.inf  # a token is picked once
        pick_B = nearest_BN.argmax(dim=-1)
        picks.append(pick_B)
    return torch.stack(picks, dim=1)


def _max_min_image(unit_NR: Tensor, likeliest: np.ndarray, k: int) -> np.ndarray:
    rows = _RowsAhead(unit_NR.numpy(), unit_NR.T)
    picks = np.empty(k, dtype=np.int64)
    picks[0] = likeliest.argmax()
    nearest = np.full_like(likeliest, np.inf)
    for step in range(1, k):
        pick = int(picks[step - 1])
        row, _ = rows.take(pick, likeliest, k - step)
        np.minimum(nearest, 1 - row, out=nearest)
        nearest[pick] = -np.inf  # a token is picked once
        picks[step] = nearest.argmax()
        likeliest = nearest
    return picks


def _noise(dtype: torch.dtype) -> float:
    """The share of a token's own variance below which its conditional variance is only rounding error."""
    return 8 * torch.finfo(dtype).eps
