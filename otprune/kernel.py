"""The kernels of the log-det methods, computed from projected tokens as a factor F and a ridge: K = ridge I + F F^T.

OTPrune's kernel I + g G G^T (paper Eq. 8) has F = G = V V^T and ridge 1 / g; the linear kernel I + g G has F = V and
ridge 1 / g. Dividing a kernel by g shifts log det K_SS by k log g for every set, so it changes no pick.

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
WHOLE_KERNEL = 4096  # up to this number of tokens, selectors may form N x N matrices: 64 MiB in float32
WHOLE_GRAM = 256  # up to this number of tokens, computing a Gram matrix in blocks costs more calls than it saves work


def forms_kernel(num_tokens: int) -> bool:
    """Whether selectors may form N x N matrices of an image. Longer images get rows of the kernel as they are picked.

    Only the number of tokens decides, so the choice of one image depends on neither its batch nor its budget.
    """
    return num_tokens <= WHOLE_KERNEL


def compute_dtype(features: Tensor) -> torch.dtype:
    """The dtype in which `features` are computed: float64 for float64, float32 for every other floating type."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def unit_columns(features_BND: Tensor, *, centered: bool = False) -> Tensor:
    """Tokens [B, N, D] with every feature column of every image scaled to L2 norm 1 over that image's N tokens.

    This is the released code's reading of "unit variance": no mean removed, no sqrt(N). `centered` removes the mean
    first. A column without energy stays zero: a column of zeros or, after centring, a column that was constant up to
    the rounding of its mean. The result is float64 for float64 features and else float32.
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
    # numpy's einsum reduces the middle dimension of 576 x 4096 in one pass of 0.3 ms without a copy; torch takes 0.8 to
    # 9 ms.
    tokens = tokens_BND.numpy()
    norm = np.sqrt(np.einsum("bnd,bnd->bd", tokens, tokens))
    scale = np.divide(1, norm, out=np.zeros_like(norm), where=norm > noise_BD.numpy())
    return torch.from_numpy(tokens * scale[:, None])


def mean_diagonal(gram_BNN: Tensor) -> Tensor:
    """The mean squared length [B] of each image's tokens: the mean of the diagonal of their Gram matrix."""
    if gram_BNN.device.type != "cpu":
        return gram_BNN.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return torch.from_numpy(np.einsum("bnn->b", gram_BNN.numpy()) / gram_BNN.shape[-1])


def mean_square_length(tokens_BND: Tensor) -> Tensor:
    """The mean squared length [B] of each image's tokens, from the tokens."""
    return torch.linalg.vector_norm(tokens_BND, dim=(1, 2)).square() / tokens_BND.shape[1]


def token_gram(features_BND: Tensor, *, centered: bool = False) -> Tensor:
    """G = V V^T [B, N, N], with V from `unit_columns`, in float32 (float64 for float64).

    The Triton kernel never writes V, and rounds its operands to TF32.
    """
    if module := fused(features_BND):
        return module.token_gram(features_BND.detach(), centered=centered)
    return gram(unit_columns(features_BND, centered=centered))


def gram(rows_BNR: Tensor) -> Tensor:
    """The Gram matrix [B, N, N] of each image: the products of every two of its rows.

    For more than WHOLE_GRAM tokens, a CPU computes blocks of the upper triangle and mirrors them: 0.56 to 0.8 of the
    multiplications. The products are not in bfloat16, although CPUs may have matrix units for it. Rounded tokens keep
    0.9999 of the float64 greedy's log det in 99 cases of 100, not in all (benchmarks/gram_precision.py); the three
    bfloat16 products that keep it in all cases take longer than one float32 product.
    """
    if module := fused(rows_BNR):
        return module.gram(rows_BNR)
    if rows_BNR.device.type != "cpu":
        return rows_BNR @ rows_BNR.mT
    B, N, _ = rows_BNR.shape
    gram_BNN = rows_BNR.new_empty(B, N, N)
    # The threads of a product wait for the slowest one at every block, and long on a busy machine. Several threads
    # therefore get fewer and larger blocks than one thread.
    size = max(1, N) if N <= WHOLE_GRAM else max(192 if torch.get_num_threads() == 1 else 288, -(-N // 8))
    for rows_NR, gram_NN in zip(rows_BNR, gram_BNN, strict=True):
        mirrored = gram_NN.numpy()  # a view of the same memory; numpy's copies start no threads
        for start in range(0, N, size):
            stop = start + size
            torch.mm(rows_NR[start:stop], rows_NR[start:].T, out=gram_NN[start:stop, start:])
            mirrored[stop:, start:stop] = mirrored[start:stop, stop:].T
    return gram_BNN


def product_diagonal(factor_BNR: Tensor, middle_BRR: Tensor) -> Tensor:
    """The diagonal [B, N] of F M F^T, for a symmetric M [B, R, R]. O(N R) memory.

    M is read in panels of columns, each from its diagonal block down. What lies below the block counts twice, so that
    a wide factor takes 9/16 of the multiplications of F M.
    """
    R = factor_BNR.shape[-1]
    diagonal_BN = factor_BNR.new_zeros(factor_BNR.shape[:2])
    size = max(256, -(-R // 8))
    for start in range(0, R, size):
        stop = start + size
        panel_BRP = middle_BRR[:, start:, start:stop].clone()
        panel_BRP[:, size:] *= 2
        product_BNP = factor_BNR[:, :, start:] @ panel_BRP
        diagonal_BN += product_BNP.mul_(factor_BNR[:, :, start:stop]).sum(dim=-1)
    return diagonal_BN


def fused(values: Tensor) -> ModuleType | None:
    """The module `otprune.triton_greedy` if its kernels can take `values`, else None.

    The kernels need CUDA with compute capability 8.0, a dtype up to float32, a C compiler and at most 4,096 tokens,
    because one Triton program holds the conditional variances of an image in registers.
    """
    if not values.is_cuda or values.dtype == torch.float64 or values.numel() == 0 or values.shape[1] > 4096:
        return None
    if torch.version.hip or torch.cuda.get_device_capability(values.device) < (8, 0) or not _can_compile():
        return None
    from otprune import triton_greedy  # imports Triton, which CPU builds of PyTorch lack

    return triton_greedy


@cache
def _can_compile() -> bool:
    """Whether Triton and the C compiler that builds its launcher are installed: the compiler in CC, else gcc or clang.

    The check looks only for the executable. It does not check that the compiler works, that Python's headers are
    installed, or whether a cached launcher makes the compiler unnecessary.
    """
    if not find_spec("triton"):
        return False
    configured = os.environ.get("CC")
    if any(map(shutil.which, ("gcc", "clang") if configured is None else (configured,))):
        return True
    logger.warning("Triton finds no C compiler (CC, gcc or clang): tokens are selected without its kernels")
    return False


def image_by_image_on_cpu(
    select: Callable[Concatenate[Tensor, int, Settings], Tensor],
) -> Callable[Concatenate[Tensor, int, Settings], Tensor]:
    """Decorates a selector so that it gets a CPU batch one image at a time.

    The matrices of one image stay in the CPU's cache, and the memory is that of one image. The answer for an image is
    also independent of its batch, bit for bit.
    """

    @wraps(select)
    def select_one_by_one(features_BND: Tensor, k: int, *args: Settings.args, **settings: Settings.kwargs) -> Tensor:
        if features_BND.device.type != "cpu" or len(features_BND) == 1:
            return select(features_BND, k, *args, **settings)
        return torch.cat([select(image, k, *args, **settings) for image in features_BND.split(1)])

    return select_one_by_one


def squared_kernel_ridge(gamma: float, gamma_scale: str, mean_diagonal_B: Tensor, num_tokens: int, k: int) -> Tensor:
    """The ridge 1 / g [B] of OTPrune's K = I + g G G^T, with G from unit columns: K / g = (1 / g) I + G G^T.

    - released: g = gamma, as in the released code. Neither N nor k enters.
    - paper:    g = gamma N / k. Eq. 8 has gamma / (N k) on columns of unit second moment, whose G is N times ours.
    - trace:    g = gamma / mean(diag G)^2. G is divided by its mean diagonal, which is D / N when no column is zero, so
                that gamma means the same at every width. 0.5 here is the released 0.01 at 576 x 4096.
    """
    if gamma_scale == "released":
        return torch.full_like(mean_diagonal_B, 1 / gamma)
    if gamma_scale == "paper":
        return torch.full_like(mean_diagonal_B, k / (gamma * num_tokens))
    return mean_diagonal_B.square() / gamma
