"""Triton kernels for selection on CUDA: column scales, symmetric Gram matrices and the whole greedy.

A batch takes four launches. The module needs Triton, which CUDA builds of PyTorch include. kernel.py and greedy.py call
the module where `kernel.fused` allows it. Their PyTorch code is the fallback and the oracle of
tests/otprune/test_triton.py, which uses Triton's interpreter on a machine without a GPU.

- The Gram kernel centres and scales the tokens as it loads them, so that no normalised copy is written. It computes one
  triangle on tensor cores with float32 sums, and writes each block and its mirror image.
- The greedy runs one program an image. The conditional variances stay in registers; a pick reads one row of the kernel
  matrix and the earlier Cholesky columns, which the L2 cache holds.

The log det must reach 0.9999 of that of a float64 greedy. benchmarks/gram_precision.py measures the precision that this
takes: it rounds the operands of both products on a CPU in 204 cases.

    tokens, kernel                   below 0.9999   worst       sets changed
    float32, float32                        0       0.999918         5
    TF32, three passes (here)               0       0.999918         8
    TF32, TF32                              0       0.999990        19
    TF32 truncated, the same                3       0.999273        26
    bfloat16, bfloat16                     15       0.999343        87
    bfloat16 in and out                   102       0.892620       162

The tokens therefore need TF32 rounded to nearest; tensor cores truncate, so `_to_tf32` rounds first. The product of the
factor is small but its rounding changes more picks than that of the tokens, so it takes three passes (TF32 here,
bfloat16 in the table).

The speed has not been measured: this file was written and tested without a GPU. It compiles for sm_80 and sm_90.

Shape suffixes: B images, N visual tokens, D feature width, R columns of a factor, K kept tokens.
"""

# pyright: reportMissingImports=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor


def token_gram(features_BND: Tensor, *, centered: bool) -> Tensor:
    """As `kernel.token_gram`: float32 [B, N, N] from tokens [B, N, D] of float16, bfloat16 or float32."""
    if features_BND.stride(-1) != 1:
        features_BND = features_BND.contiguous()
    B, N, D = features_BND.shape
    mean_BD = torch.empty(B, D, dtype=torch.float32, device=features_BND.device)
    scale_BD = torch.empty_like(mean_BD)
    noise = 8 * torch.finfo(torch.float32).eps * N**0.5
    strides = features_BND.stride()[:2]
    with torch.cuda.device_of(features_BND):  # Triton launches on the current device
        _column_scales[(triton.cdiv(D, 64), B)](
            features_BND, *strides, mean_BD, scale_BD, N, D, noise, CENTERED=centered, BLOCK_N=32, BLOCK_D=64
        )
    return _gram(features_BND, mean_BD, scale_BD)


def gram(rows_BNR: Tensor) -> Tensor:
    """As `kernel.gram`: float32 [B, N, N] from float32 rows [B, N, R]."""
    return _gram(rows_BNR.contiguous(), None, None)


def greedy_from_kernel(excess_BNN: Tensor, ridge_B: Tensor, k: int) -> Tensor:
    """As `greedy.greedy_from_kernel`, in one launch: int64 [B, k] in the order picked, ties to the lowest index."""
    excess_BNN = excess_BNN.contiguous()
    B, N, _ = excess_BNN.shape
    chol_BKN = torch.empty(B, k, N, dtype=torch.float32, device=excess_BNN.device)
    picks_BK = torch.empty(B, k, dtype=torch.int64, device=excess_BNN.device)
    noise = 8 * torch.finfo(torch.float32).eps
    width = max(32, triton.next_power_of_2(N))
    # A program loads the Cholesky columns in tiles [BLOCK_K, width] of at most 2^14 numbers.
    block_k, num_warps = max(4, min(16, 2**14 // width)), max(4, min(16, width // 128))
    with torch.cuda.device_of(excess_BNN):
        _greedy[(B,)](
            excess_BNN, ridge_B, chol_BKN, picks_BK, N, k, noise, BLOCK_N=width, BLOCK_K=block_k, num_warps=num_warps
        )
    return picks_BK


def _gram(rows_BNR: Tensor, mean_BR: Tensor | None, scale_BR: Tensor | None) -> Tensor:
    B, N, R = rows_BNR.shape
    gram_BNN = torch.empty(B, N, N, dtype=torch.float32, device=rows_BNR.device)
    num_blocks = triton.cdiv(N, 128)
    grid = (num_blocks * (num_blocks + 1) // 2, B)  # the blocks of one triangle, diagonal included
    scaled = scale_BR is not None
    strides = rows_BNR.stride()[:2]
    with torch.cuda.device_of(rows_BNR):
        _symmetric_gram[grid](
            rows_BNR, *strides, mean_BR, scale_BR, gram_BNN, N, R, SCALED=scaled, BLOCK_N=128, BLOCK_R=32, num_warps=8
        )
    return gram_BNN


@triton.jit
def _column_scales(
    tokens,
    stride_B,
    stride_N,
    means,
    scales,
    N,
    D,
    noise,
    CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = column_D < D
    tokens += image * stride_B + column_D[None, :]

    mean_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    if CENTERED:
        for start in range(0, N, BLOCK_N):
            token_N = start + tl.arange(0, BLOCK_N)
            inside_ND = (token_N < N)[:, None] & inside_D[None, :]
            value_ND = tl.load(tokens + token_N[:, None] * stride_N, mask=inside_ND, other=0.0).to(tl.float32)
            mean_D += tl.sum(value_ND, axis=0)
        mean_D /= N
    energy_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        token_N = start + tl.arange(0, BLOCK_N)
        inside_ND = (token_N < N)[:, None] & inside_D[None, :]
        value_ND = tl.load(tokens + token_N[:, None] * stride_N, mask=inside_ND, other=0.0).to(tl.float32)
        value_ND = tl.where(inside_ND, value_ND - mean_D[None, :], 0.0)
        energy_D += tl.sum(value_ND * value_ND, axis=0)
    norm_D = tl.sqrt(energy_D)
    has_energy_D = norm_D > noise * tl.abs(mean_D)
    scale_D = tl.where(has_energy_D, 1 / tl.where(has_energy_D, norm_D, 1.0), 0.0)
    tl.store(means + image * D + column_D, mean_D, mask=inside_D)
    tl.store(scales + image * D + column_D, scale_D, mask=inside_D)


@triton.jit
def _symmetric_gram(
    rows,
    stride_B,
    stride_N,
    means,
    scales,
    grams,
    N,
    R,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)  # blocks of the lower triangle are numbered row by row: 0 | 1 2 | 3 4 5 | ...
    block_i = _triangle_row(((tl.sqrt(8.0 * block + 1.0) - 1.0) / 2.0).to(tl.int32), block)
    i_N = block_i * BLOCK_N + tl.arange(0, BLOCK_N)
    j_N = (block - block_i * (block_i + 1) // 2) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows += image * stride_B
    grams += image * N * N

    product_NN = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        column_R = start + tl.arange(0, BLOCK_R)
        inside_R = column_R < R
        i_inside = (i_N < N)[:, None] & inside_R[None, :]
        j_inside = (j_N < N)[:, None] & inside_R[None, :]
        i_NR = tl.load(rows + i_N[:, None] * stride_N + column_R[None, :], mask=i_inside, other=0.0).to(tl.float32)
        j_NR = tl.load(rows + j_N[:, None] * stride_N + column_R[None, :], mask=j_inside, other=0.0).to(tl.float32)
        if SCALED:
            mean_R = tl.load(means + image * R + column_R, mask=inside_R, other=0.0)
            scale_R = tl.load(scales + image * R + column_R, mask=inside_R, other=0.0)
            i_NR = _to_tf32((i_NR - mean_R[None, :]) * scale_R[None, :])
            j_NR = _to_tf32((j_NR - mean_R[None, :]) * scale_R[None, :])
            product_NN = tl.dot(i_NR, tl.trans(j_NR), product_NN, input_precision="tf32")
        else:
            product_NN = tl.dot(i_NR, tl.trans(j_NR), product_NN, input_precision="tf32x3")
    inside_NN = (i_N < N)[:, None] & (j_N < N)[None, :]
    tl.store(grams + i_N[:, None] * N + j_N[None, :], product_NN, mask=inside_NN)
    tl.store(grams + j_N[None, :] * N + i_N[:, None], product_NN, mask=inside_NN)


@triton.jit
def _triangle_row(guess, block):
    """The row of `block` in a triangle. `guess` may be off by one, because a GPU's square root is approximate."""
    row = guess - (guess * (guess + 1) // 2 > block)
    return row + ((row + 1) * (row + 2) // 2 <= block)


@triton.jit
def _to_tf32(values):
    """The nearest numbers with 10 bits of mantissa, ties to even."""
    # Integer arithmetic on the bits: the sum rounds by carrying into the 10 bits, and the mask clears the other 13.
    raw = values.to(tl.int32, bitcast=True)
    raw = (raw + 0xFFF + ((raw >> 13) & 1)) & -0x2000
    return raw.to(tl.float32, bitcast=True)


@triton.jit
def _greedy(
    excesses,
    ridges,
    chols,
    picks,
    N,
    K,
    noise,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    token_N = tl.arange(0, BLOCK_N)
    inside_N = token_N < N
    excesses += image * N * N
    chols += image * K * N

    ridge = tl.load(ridges + image)
    excess_N = tl.load(excesses + token_N * (N + 1), mask=inside_N, other=-float("inf"))
    for step in range(K):
        excess, pick = tl.max(excess_N, axis=0, return_indices=True)
        tl.store(picks + image * K + step, pick.to(tl.int64))
        column_N = tl.load(excesses + pick * N + token_N, mask=inside_N, other=0.0)
        for start in range(0, step, BLOCK_K):
            earlier_K = start + tl.arange(0, BLOCK_K)
            inside_KN = (earlier_K < step)[:, None] & inside_N[None, :]
            weight_K = tl.load(chols + earlier_K * N + pick, mask=earlier_K < step, other=0.0)
            chol_KN = tl.load(chols + earlier_K[:, None] * N + token_N[None, :], mask=inside_KN, other=0.0)
            column_N -= tl.sum(weight_K[:, None] * chol_KN, axis=0)
        variance = ridge + excess
        floor = noise * (ridge + tl.load(excesses + pick * (N + 1)))
        column_N *= tl.where(variance > floor, 1 / tl.sqrt(tl.where(variance > floor, variance, 1.0)), 0.0)
        tl.store(chols + step * N + token_N, column_N, mask=inside_N)
        excess_N = tl.where(token_N == pick, -float("inf"), excess_N - column_N * column_N)
        tl.debug_barrier()  # the next step reads this column in other threads than those that stored it
