"""From projected tokens to the factor F of the selection kernel K = I + F F^T.

Both log-det methods share this shape. OTPrune's kernel I + g G G^T (paper Eq. 8) has F = sqrt(g) G with G = V V^T;
the linear kernel I + g G has F = sqrt(g) V. The greedy needs K's diagonal and the k rows it picks, never all of K.

Shape suffixes: B images, N visual tokens, D feature width, R columns of a factor.
"""

import torch
from torch import Tensor

GAMMA_SCALES = ("released", "paper", "trace")


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 stays float64; every other floating type is computed in float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def unit_columns(features_BND: Tensor, *, centered: bool = False) -> Tensor:
    """Tokens [B, N, D] with every feature column of every image scaled to L2 norm 1 over that image's N tokens.

    The released code's reading of "unit variance" (no mean removed, no sqrt(N)); `centered` removes the mean first.
    A column without energy has no scale and stays zero: one that is all zeros or, once centred, one that was
    constant up to the rounding of its mean. float32 out, float64 for float64.
    """
    tokens_BND = features_BND.to(compute_dtype(features_BND))
    noise_BD = tokens_BND.new_zeros(())
    if centered:
        mean_BD = tokens_BND.mean(dim=1)
        tokens_BND = tokens_BND - mean_BD[:, None]
        noise_BD = mean_BD.abs() * (8 * torch.finfo(tokens_BND.dtype).eps * tokens_BND.shape[1] ** 0.5)
    norm_BD = torch.linalg.vector_norm(tokens_BND, dim=1)
    scale_BD = torch.where(norm_BD > noise_BD, 1 / norm_BD, 0)
    return tokens_BND * scale_BD[:, None]


def squared_kernel_scale(gamma: float, gamma_scale: str, mean_diagonal_B: Tensor, num_tokens: int, k: int) -> Tensor:
    """The factor g [B] in OTPrune's K = I + g G G^T, with G from unit columns.

    - released: g = gamma. What the released code does; neither N nor k enters.
    - paper:    g = gamma N / k. Eq. 8 has gamma / (N k) on columns of unit second moment, whose G is N times ours.
    - trace:    g = gamma / mean(diag G)^2. G first divided by its mean diagonal, D / N when no column is zero, so that
                gamma means the same at every width; 0.5 here is the released 0.01 at 576 x 4096.
    """
    if gamma_scale == "released":
        return torch.full_like(mean_diagonal_B, gamma)
    if gamma_scale == "paper":
        return torch.full_like(mean_diagonal_B, gamma * num_tokens / k)
    return per_trace(gamma, mean_diagonal_B.square())


def per_trace(gamma: float, energy_B: Tensor) -> Tensor:
    """gamma / energy [B], and 0 for an image whose every feature is zero: its kernel is I at any scale."""
    return torch.where(energy_B > 0, gamma / energy_B, 0)
