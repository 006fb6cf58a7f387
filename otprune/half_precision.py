"""The arithmetic of the released OTPrune and DivPrune in float16, to compare with numbers that were published with it.

Both releases run in the model's float16 and round on the way. What is float16 there is rounded to float16 here, and
sums are float32, as on a GPU:

- OTPrune: the tokens; the norm of each feature column; each Cholesky column where it is stored, and the product of the
  earlier ones. The kernel and the conditional variances are float32. Small residues decide late picks, and the rounded
  columns alone change them.
- DivPrune: the tokens, their norms, the unit tokens, and their cosines, which are then multiples of 2^-11 between 1/2
  and 1: many distances tie.

Departures:
- The releases' GPU may multiply the float32 kernel in TF32, which is not reproduced.
- Ties go to the lowest index.

Shape suffixes: B images, N visual tokens, D feature width, K kept tokens.
"""

import torch
from torch import Tensor

from otprune.kernel import WHOLE_KERNEL, forms_kernel


def check_length(features_BND: Tensor) -> None:
    """Raises ValueError for more tokens than selectors form N x N matrices for; no release was run on so many."""
    if not forms_kernel(features_BND.shape[1]):
        raise ValueError(
            f"precision must be float32 above {WHOLE_KERNEL} tokens, got released for {features_BND.shape[1]}"
        )


def rounded(values: Tensor) -> Tensor:
    """The nearest float16 of each value, as float32."""
    return values.half().float()


def unit_columns(features_BND: Tensor) -> Tensor:
    """Tokens [B, N, D] in float32 with each feature column divided by its norm over the tokens, which is rounded.

    A column whose rounded norm is 0 becomes zero.
    """
    tokens_BND = rounded(features_BND.detach())
    norm_B1D = rounded(torch.linalg.vector_norm(tokens_BND, dim=1, keepdim=True))
    return torch.where(norm_B1D > 0, tokens_BND / norm_B1D, 0)


def cosines(features_BND: Tensor) -> Tensor:
    """The cosines [B, N, N] of all pairs of tokens, rounded; 0 for a token whose rounded norm is 0."""
    tokens_BND = rounded(features_BND.detach())
    norm_BN1 = rounded(torch.linalg.vector_norm(tokens_BND, dim=2, keepdim=True))
    unit_BND = torch.where(norm_BN1 > 0, rounded(tokens_BND / norm_BN1), 0)
    return rounded(unit_BND @ unit_BND.mT)


def greedy_logdet(kernel_NN: Tensor, k: int) -> list[int]:
    """The k picks of one image that the release makes from its kernel I + g G G^T, float32, in the order picked.

    As in the release no pick is masked. Where rounding lets a token be picked again, the picked tokens are taken out of
    the kernel and the search begins anew for the picks that are missing.
    """
    picks: list[int] = []
    while missing := k - len(picks):
        left_N = torch.ones(len(kernel_NN), dtype=torch.bool, device=kernel_NN.device)
        left_N[picks] = False
        found = _greedy(kernel_NN * left_N[:, None] * left_N, missing)
        fresh = [pick for pick in dict.fromkeys(found) if pick not in picks]
        # The rounding never leaves a kernel without a token; if it did, the lowest indices would be as good as any.
        picks += fresh or left_N.nonzero()[:missing, 0].tolist()
    return picks


def _greedy(kernel_NN: Tensor, k: int) -> list[int]:
    """At most k picks, the same one perhaps twice; fewer where no conditional variance is positive."""
    variance_N = kernel_NN.diagonal().clone()
    column_KN = kernel_NN.new_zeros(k, len(kernel_NN))
    picks = [int(variance_N.argmax())]
    for step in range(k - 1):
        pick = picks[-1]
        explained_N = rounded(column_KN[:step, pick] @ column_KN[:step])
        column_N = (kernel_NN[pick] - explained_N) / variance_N[pick].sqrt()
        column_KN[step] = rounded(column_N)
        variance_N -= column_N.square()  # of the column before it is rounded
        best = int(variance_N.argmax())
        if not variance_N[best] > 0:
            break
        picks.append(best)
    return picks
