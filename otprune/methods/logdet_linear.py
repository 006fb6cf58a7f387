"""Linear log-det selection: greedy D-optimal design on the tokens.

The method maximises log det(I_k + g V_C V_C^T) = log det(I_D + g sum_{i in C} v_i v_i^T) (Sylvester), where V has unit
columns.

Objective: take each token as one noisy linear measurement y_i = <v_i, w> + noise of an unknown w ~ N(0, g I). The
objective is then twice the information (in nats) that the kept tokens carry about w, as in Bayesian D-optimal
experimental design. It is also the log-volume of the kept second moment. OTPrune's kernel I + g G G^T weighs every
direction once more by its energy in the whole image.

Theory: adding token j gains log(1 + g v_j^T (I + g sum_C v v^T)^-1 v_j). The gain is >= 0 (monotone) and the inverse
can only shrink as C grows (submodular), so the greedy set reaches at least 1 - 1/e of the best set of its size.

Cost on a CPU, and for long images everywhere (`kernel.forms_kernel`): O(N D k) time and O(N D + N k) memory an image,
without an N x N matrix. A pick needs one row of G, the product V v_j.
"""

from functools import partial

from torch import Tensor

from otprune.greedy import greedy_from_kernel, greedy_logdet
from otprune.kernel import (
    forms_kernel,
    image_by_image_on_cpu,
    mean_diagonal,
    mean_square_length,
    token_gram,
    unit_columns,
)
from otprune.methods.base import Selector, Shared

DEFAULT_GAMMA = 1.0


@image_by_image_on_cpu
def logdet_linear(features_BND: Tensor, k: int, *, gamma: float | None = None, centered: bool = False) -> Tensor:
    """Token indices int64 [B, k] in the order picked.

    Args:
        features_BND: projected visual tokens, any floating type.
        k: number of tokens to keep, in [1, N].
        gamma: on the trace scale: the kernel is I + gamma G / mean(diag G), so that gamma means the same at every
            width. None is 1.0.
        centered: first remove the mean of each column over the image. The design then measures how tokens differ and
            not what they share.
    """
    gamma = DEFAULT_GAMMA if gamma is None else gamma
    if features_BND.device.type == "cpu" or not forms_kernel(features_BND.shape[1]):
        tokens_BND = unit_columns(features_BND, centered=centered)
        return greedy_logdet(tokens_BND, mean_square_length(tokens_BND) / gamma, k)
    # A GPU computes all of G in less time than it takes to read V once for every pick.
    gram_BNN = token_gram(features_BND, centered=centered)
    return greedy_from_kernel(gram_BNN, mean_diagonal(gram_BNN) / gamma, k)


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds: N^2 D for the kernel, or N D (k + 1) on a CPU and for long images; and N k (k - 1) / 2 for the
    earlier Cholesky columns times the row of each pick."""
    by_rows = on_cpu or not forms_kernel(num_tokens)
    kernel = num_tokens * width * (kept + 1 if by_rows else num_tokens)
    return kernel + num_tokens * kept * (kept - 1) // 2


_GAMMA = frozenset[Shared](("gamma",))

LOGDET_LINEAR = Selector(name="logdet_linear", choose=logdet_linear, cost=_cost, shared=_GAMMA)
LOGDET_LINEAR_CENTERED = Selector(
    name="logdet_linear_centered", choose=partial(logdet_linear, centered=True), cost=_cost, shared=_GAMMA
)
