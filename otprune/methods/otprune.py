"""OTPrune (arXiv 2602.20205): keep the tokens whose Gaussian is closest to that of all tokens, by a log-det surrogate.

The method greedily maximises log det(I + g Vt_C Vt_C^T), Vt = V V^T (Eq. 8), over index sets C of size k.

Departures:
- Columns are L2-normalised over the image's tokens and not centred, as in the released code; the paper says unit
  variance. `gamma_scale` chooses the meaning of gamma under this normalisation (`kernel.squared_kernel_ridge`).
  test_gamma_scales_agree_where_theory_says_so
- A column without energy stays zero; the released code divides by zero there. test_zero_columns_are_ignored
- Norms, products and Cholesky columns are float32, whatever the model's dtype. The released code has the norms and the
  columns in float16, which changes many of its picks where the tokens share most of their energy; with
  `precision="released"` so do we (`half_precision`). test_half_precision.py
- `select_tokens` returns ascending indices; the released code returns them in the order of a CPython set.
  test_select.py
- `centered` first removes the mean of each column over the image. The paper assumes zero-mean tokens and never centres
  them, so that the kernel's largest eigenvalue belongs to a direction that every token shares.
"""

from functools import partial

import torch
from torch import Tensor

from otprune import half_precision
from otprune.greedy import greedy_logdet
from otprune.kernel import (
    forms_kernel,
    gram,
    image_by_image_on_cpu,
    mean_diagonal,
    mean_square_length,
    squared_kernel_ridge,
    token_gram,
    unit_columns,
)
from otprune.methods.base import Selector, Shared
from otprune.methods.settings import PRECISION

DEFAULT_GAMMA = {"released": 0.01, "paper": 0.01, "trace": 0.5}


@image_by_image_on_cpu
def otprune(
    features_BND: Tensor,
    k: int,
    *,
    gamma: float | None = None,
    gamma_scale: str = "released",
    centered: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Token indices int64 [B, k] in the order picked.

    O(N^2 (D + k)) time and O(N D + N^2 + N k) memory an image where `kernel.forms_kernel` allows N x N matrices. Longer
    images never form G: G G^T = V M V^T with M = V^T V [D, D], so that they take O(N (D^2 + D k + k^2)) time and
    O(N (D + k) + D^2) memory.

    Args:
        features_BND: projected visual tokens, any floating type.
        k: number of tokens to keep, in [1, N].
        gamma: positive; None is 0.01 on the released and paper scales and 0.5 on the trace scale.
        gamma_scale: released | paper | trace (`kernel.squared_kernel_ridge`).
        centered: first remove the mean of each column over the image.
        precision: float32 | released (`half_precision`): not centred, for images of which `kernel.forms_kernel` allows
            N x N matrices, one after the other and waiting for the device at every pick.

    Raises:
        ValueError: for longer images in the released precision.
    """
    gamma = DEFAULT_GAMMA[gamma_scale] if gamma is None else gamma
    N = features_BND.shape[1]
    if precision == "released":
        return _released(features_BND, k, gamma, gamma_scale)
    if forms_kernel(N):
        gram_BNN = token_gram(features_BND, centered=centered)
        ridge_B = squared_kernel_ridge(gamma, gamma_scale, mean_diagonal(gram_BNN), N, k)
        return greedy_logdet(gram_BNN, ridge_B, k, symmetric=True)
    tokens_BND = unit_columns(features_BND, centered=centered)
    ridge_B = squared_kernel_ridge(gamma, gamma_scale, mean_square_length(tokens_BND), N, k)
    return greedy_logdet(tokens_BND, ridge_B, k, middle_BRR=gram(tokens_BND.mT))


def _released(features_BND: Tensor, k: int, gamma: float, gamma_scale: str) -> Tensor:
    """As `otprune`, with what is float16 in the release rounded to float16, one image after the other."""
    half_precision.check_length(features_BND)
    N = features_BND.shape[1]
    tokens_BND = half_precision.unit_columns(features_BND)
    gram_BNN = tokens_BND @ tokens_BND.mT
    ridge_B = squared_kernel_ridge(gamma, gamma_scale, mean_diagonal(gram_BNN), N, k)
    kernel_BNN = torch.eye(N, device=gram_BNN.device) + gram_BNN @ gram_BNN.mT / ridge_B[:, None, None]
    picks = [half_precision.greedy_logdet(kernel_NN, k) for kernel_NN in kernel_BNN]
    return torch.tensor(picks, dtype=torch.int64, device=features_BND.device).reshape(-1, k)


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds: N^2 D for the Gram matrix; N^3 for the kernel, or N^2 (k + 1) on a CPU, which computes only k rows
    and the diagonal; and N k (k - 1) / 2 for the earlier Cholesky columns times the row of each pick. Without a Gram
    matrix, N D^2 for M, N D^2 for the diagonal and (N D + D^2) k for the rows take the place of the first two."""
    explained = num_tokens * kept * (kept - 1) // 2
    if forms_kernel(num_tokens):
        return num_tokens**2 * (width + (kept + 1 if on_cpu else num_tokens)) + explained
    return 2 * num_tokens * width**2 + (num_tokens + width) * width * kept + explained


_GAMMA = frozenset[Shared](("gamma", "gamma_scale"))

OTPRUNE = Selector(name="otprune", choose=otprune, cost=_cost, shared=_GAMMA, settings={"precision": PRECISION})
OTPRUNE_CENTERED = Selector(name="otprune_centered", choose=partial(otprune, centered=True), cost=_cost, shared=_GAMMA)
