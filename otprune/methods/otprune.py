"""OTPrune (arXiv 2602.20205): keep the tokens whose Gaussian is closest to that of all tokens, by a log-det surrogate.

Maximises log det(I + g Vt_C Vt_C^T), Vt = V V^T (Eq. 8), over index sets C of size k, greedily.

Departures:
- Columns are L2-normalised over the image's tokens, uncentred, as released; the paper says unit variance. What gamma
  then means is `gamma_scale` (see kernel.py). test_gamma_scales_agree_where_theory_says_so
- A column without energy stays zero; the released code divides by zero there. test_zero_columns_are_ignored
- Normalised and multiplied in float32, whatever the model's dtype; the released norm is taken in float16.
- Indices leave `select_tokens` ascending; the released code emits CPython set order. test_select.py
- `centered` removes each column's mean over the image first. The paper assumes zero-mean tokens and never centres them,
  which spends the kernel's largest eigenvalue on a direction that every token shares.
"""

from functools import partial

from torch import Tensor

from otprune.greedy import greedy_logdet
from otprune.kernel import image_by_image_on_cpu, mean_diagonal, squared_kernel_ridge, token_gram
from otprune.methods.base import Selector, Shared

DEFAULT_GAMMA = {"released": 0.01, "paper": 0.01, "trace": 0.5}


@image_by_image_on_cpu
def otprune(
    features_BND: Tensor,
    k: int,
    *,
    gamma: float | None = None,
    gamma_scale: str = "released",
    centered: bool = False,
) -> Tensor:
    """Tokens int64 [B, k] in the order picked. O(N^2 (D + k)) time and O(N D + N^2 + N k) memory an image.

    `gamma` None is 0.01 on the released and paper scales and 0.5 on the trace scale.
    """
    gamma = DEFAULT_GAMMA[gamma_scale] if gamma is None else gamma
    gram_BNN = token_gram(features_BND, centered=centered)
    ridge_B = squared_kernel_ridge(gamma, gamma_scale, mean_diagonal(gram_BNN), gram_BNN.shape[-1], k)
    return greedy_logdet(gram_BNN, ridge_B, k, symmetric=True)


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """N^2 D + N^3, or on a CPU, which forms k rows of the kernel and its diagonal, N^2 D + N^2 (k + 1); and in either
    case the Cholesky columns so far times each pick's row, N k (k - 1) / 2."""
    return num_tokens**2 * (width + (kept + 1 if on_cpu else num_tokens)) + num_tokens * kept * (kept - 1) // 2


_GAMMA = frozenset[Shared](("gamma", "gamma_scale"))

OTPRUNE = Selector(name="otprune", choose=otprune, cost=_cost, shared=_GAMMA)
OTPRUNE_CENTERED = Selector(name="otprune_centered", choose=partial(otprune, centered=True), cost=_cost, shared=_GAMMA)
