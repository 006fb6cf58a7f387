"""From projected tokens to a selection kernel, held as a factor F and a ridge: K = ridge I + F F^T.

Both log-det methods share this shape. OTPrune's kernel I + g G G^T (paper Eq. 8) has F = G = V V^T and ridge 1 / g; the
linear kernel I + g G has F = V and ridge 1 / g. Dividing a kernel by g moves log det K_SS by k log g: no pick changes.

Shape suffixes: B images, N visual tokens, D feature width, R columns of a factor.
"""

import logging
import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from types import ModuleType
from typing import Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Settings = ParamSpec("Settings")

GAMMA_SCALES = ("released", "paper", "trace")
WHOLE_GRAM = 256  # tokens up to which the calls of a blocked Gram matrix cost more than the half that it saves


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 stays float64; every other floating type is computed in float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def unit_columns(features_BND: Tensor, *, centered: bool = False) -> Tensor:
    """Tokens [B, N, D] with every feature column of every image scaled to L2 norm 1 over that image's N tokens.

    The released code's reading of "unit variance" (no mean removed, no sqrt(N)); `centered` removes the mean first.
    A column without energy has no scale and stays zero: one that is all zeros or, once centred, one that was
    constant up to the rounding of its mean. float32 out, float64 for float64.
    """
    tokens_BND = features_BND.detach().to(compute_dtype(features_BND))
    noise_BD = tokens_BND.new_zeros(())
    if centered:
        mean_BD = tokens_BND.mean(dim=1)
        tokens_BND = tokens_BND - mean_BD[:, None]
        noise_BD = mean_BD.abs() * (8 * torch.finfo(tokens_BND.dtype).eps * tokens_BND.shape[1] ** 0.5)
    if tokens_BND.device.type != "cpu":
        norm_BD = torch.linalg.vector_norm(tokens_BND, dim=1)
        return tokens_BND * torch.where(norm_BD > noise_BD, 1 / norm_BD, 0)[:, None]
    # torch reduces a middle dimension of 576 x 4096 in 0.8 to 9 ms, einsum in one 0.3 ms pass without a copy.
    tokens = tokens_BND.numpy()
    norm = np.sqrt(np.einsum("bnd,bnd->bd", tokens, tokens))
    scale = np.divide(1, norm, out=np.zeros_like(norm), where=norm > noise_BD.numpy())
    return torch.from_numpy(tokens * scale[:, None])


def mean_diagonal(gram_BNN: Tensor) -> Tensor:
    """Mean squared length [B] of an image's tokens, from their Gram matrix."""
    if gram_BNN.device.type != "cpu":
        return gram_BNN.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return torch.from_numpy(np.einsum("bnn->b", gram_BNN.numpy()) / gram_BNN.shape[-1])


def token_gram(features_BND: Tensor, *, centered: bool = False) -> Tensor:
    """G = V V^T [B, N, N] of the tokens' unit columns. On CUDA without writing V, its operands rounded to TF32."""
    if module := fused(features_BND):
        return module.token_gram(features_BND.detach(), centered=centered)
    return gram(unit_columns(features_BND, centered=centered))


def gram(rows_BNR: Tensor) -> Tensor:
    """The products [B, N, N] of every two rows of an image.

    On a CPU, of more than WHOLE_GRAM tokens the upper triangle alone, in blocks of rows, and then mirrored: 0.56 to 0.8
    of the multiplications. Not in bfloat16, fast as matrix units are: rounded tokens keep 0.9999 of the float64
    greedy's log det in 99 cases of 100, not in all (benchmarks/gram_precision.py), and the three products that keep it
    in all take longer than float32.
    """
    if module := fused(rows_BNR):
        return module.gram(rows_BNR)
    if rows_BNR.device.type != "cpu":
        return rows_BNR @ rows_BNR.mT
    B, N, _ = rows_BNR.shape
    gram_BNN = rows_BNR.new_empty(B, N, N)
    # At every block several threads wait for the slowest of them, long if the machine is busy: larger blocks then.
    size = max(1, N) if N <= WHOLE_GRAM else max(192 if torch.get_num_threads() == 1 else 288, -(-N // 8))
    for rows_NR, gram_NN in zip(rows_BNR, gram_BNN, strict=True):
        mirrored = gram_NN.numpy()  # whose copies take no threads at all
        for start in range(0, N, size):
            stop = start + size
            torch.mm(rows_NR[start:stop], rows_NR[start:].T, out=gram_NN[start:stop, start:])
            mirrored[stop:, start:stop] = mirrored[start:stop, stop:].T
    return gram_BNN


def fused(values: Tensor) -> ModuleType | None:
    """otprune.triton_greedy where it applies: CUDA from compute capability 8.0, and at most float32 and 4,096 tokens.

    An image's conditional variances must fit in the registers of one of its programs. Without a C compiler, None.
    """
    if not values.is_cuda or values.dtype == torch.float64 or values.numel() == 0 or values.shape[1] > 4096:
        return None
    if torch.version.hip or torch.cuda.get_device_capability(values.device) < (8, 0) or not _can_compile():
        return None
    from otprune import triton_greedy

    return triton_greedy


@cache
def _can_compile() -> bool:
    """Whether Triton is there, and the C compiler with which it builds its launcher: CC's, else gcc or clang.

    That the compiler is there is all that is looked at: not that it works, nor Python's headers, nor a launcher that
    was built before and would need none.
    """
    if not find_spec("triton"):
        return False
    named = os.environ.get("CC")
    if any(map(shutil.which, ("gcc", "clang") if named is None else (named,))):
        return True
    logger.warning("Triton finds no C compiler (CC, gcc or clang): tokens are selected without its kernels")
    return False


def image_by_image_on_cpu(
    select: Callable[Concatenate[Tensor, int, Settings], Tensor],
) -> Callable[Concatenate[Tensor, int, Settings], Tensor]:
    """A selector that takes a CPU batch apart: one image's matrices stay in cache, and the memory is that of one image.

    It also makes the answer independent of the batch, bit for bit.
    """

    @wraps(select)
    def each(features_BND: Tensor, k: int, *args: Settings.args, **settings: Settings.kwargs) -> Tensor:
        if features_BND.device.type != "cpu" or len(features_BND) == 1:
            return select(features_BND, k, *args, **settings)
        return torch.cat([select(image, k, *args, **settings) for image in features_BND.split(1)])

    return each


def squared_kernel_ridge(gamma: float, gamma_scale: str, mean_diagonal_B: Tensor, num_tokens: int, k: int) -> Tensor:
    """The ridge 1 / g [B] of OTPrune's K = I + g G G^T, with G from unit columns: K / g = (1 / g) I + G G^T.

    - released: g = gamma. What the released code does; neither N nor k enters.
    - paper:    g = gamma N / k. Eq. 8 has gamma / (N k) on columns of unit second moment, whose G is N times ours.
    - trace:    g = gamma / mean(diag G)^2. G first divided by its mean diagonal, D / N when no column is zero, so that
                gamma means the same at every width; 0.5 here is the released 0.01 at 576 x 4096.
    """
    if gamma_scale == "released":
        return torch.full_like(mean_diagonal_B, 1 / gamma)
    if gamma_scale == "paper":
        return torch.full_like(mean_diagonal_B, k / (gamma * num_tokens))
    return mean_diagonal_B.square() / gamma
