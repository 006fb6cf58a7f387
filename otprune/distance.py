"""Distances between the kept tokens and all tokens as distributions: the paper's objective and Wasserstein-2 distances.

Every function takes features [B, N, D] (any float dtype) and idx [B, K] (integers, distinct within each image), and
returns float64 [B]. It weighs each of the N tokens by 1/N and each of the K kept tokens by 1/K. It computes in float64,
because the distances are small differences of large traces.

With V the tokens [N, D] of one image, V_C the kept rows, S = V'V/N and S_C = V_C'V_C/K,

    tr (S^1/2 S_C S^1/2)^1/2  =  ||V V_C'||_* / sqrt(N K)          (nuclear norm: sum of singular values)

so the functions never form a D x D matrix: the cost is one [K, N] singular value decomposition an image.

Departures:
- `trace_objective` leaves out the square of the paper's Eq. 4 unless `squared=True`: the printed synthetic ratios fit
  the unsquared form in four of five settings.
- Eq. 4 is stated for columns of unit variance. The functions rescale nothing by default: pass `normalize_columns=True`
  or normalise first. The selector's own scaling (unit L2 norm over the N tokens) only divides the objective by N.
- Eq. 3 assumes zero means, which projected tokens do not have; `center=True` gives the distance between the Gaussians
  with their own means. `unit_variance=True` scales each set by itself, so that tr S_C is constant too. This is the only
  reading under which maximising Eq. 4 is minimising Eq. 3.

Shape suffixes: B images, N visual tokens, D feature width, K kept tokens, P projections, Q quantile pieces.
"""

import math

import torch
from torch import Tensor


def trace_objective(
    features: Tensor,
    idx: Tensor,
    *,
    squared: bool = False,
    center: bool = False,
    normalize_columns: bool = False,
) -> Tensor:
    """tr (S^1/2 S_C S^1/2)^1/2 of every image [B], the objective that OTPrune maximises (paper Eq. 4).

    Args:
        squared: return the square, as printed in Eq. 4.
        center: take covariances, each set about its own mean, instead of second moments about zero.
        normalize_columns: first divide every feature column by its root mean square over the N tokens (S_ii = 1, so
            that tr S = D); with `center`, by its standard deviation. A column whose scale is zero stays as it is.

    Raises:
        ValueError: as `gaussian_w2`.
    """
    full_BND, kept_BKD = _both_sets(features, idx)
    if normalize_columns:
        scale_B1D = _column_scale(full_BND, center)
        full_BND, kept_BKD = full_BND / scale_B1D, kept_BKD / scale_B1D
    if center:
        full_BND, kept_BKD = _centered(full_BND), _centered(kept_BKD)
    trace_B = _fidelity(full_BND, kept_BKD)
    return trace_B.square() if squared else trace_B


def gaussian_w2(features: Tensor, idx: Tensor, *, center: bool = False, unit_variance: bool = False) -> Tensor:
    """W2 (not squared) [B] between the Gaussians fitted to all tokens and to the kept ones; its square is paper Eq. 3.

    W2^2 = |mu - mu_C|^2 + tr S + tr S_C - 2 tr (S^1/2 S_C S^1/2)^1/2

    Args:
        center: False: both Gaussians have mean zero, and S and S_C are second moments (the paper). True: each Gaussian
            has its own mean, S and S_C are covariances (1/N and 1/K), and the first term counts.
        unit_variance: first divide the columns of each set by that set's own root mean square (with `center`: standard
            deviation), so that both traces are D. A column whose scale is zero stays as it is.

    Raises:
        ValueError: unless features is a finite floating [B, N, D] and idx an integer [B, K] on the same device whose
            rows are distinct values in [0, N).
    """
    full_BND, kept_BKD = _both_sets(features, idx)
    if unit_variance:
        full_BND = full_BND / _column_scale(full_BND, center)
        kept_BKD = kept_BKD / _column_scale(kept_BKD, center)
    mean_gap_B = full_BND.new_zeros(len(full_BND))
    if center:
        mean_gap_B = (full_BND.mean(1) - kept_BKD.mean(1)).square().sum(-1)
        full_BND, kept_BKD = _centered(full_BND), _centered(kept_BKD)
    trace_full_B = full_BND.square().sum(-1).mean(-1)
    trace_kept_B = kept_BKD.square().sum(-1).mean(-1)
    squared_B = mean_gap_B + trace_full_B + trace_kept_B - 2 * _fidelity(full_BND, kept_BKD)
    return squared_B.clamp_min(0).sqrt()  # rounding can give -1e-16 where the exact value is zero


def sliced_w2(features: Tensor, idx: Tensor, *, projections: int = 128, seed: int = 0) -> Tensor:
    """Sliced W2 [B]: root mean, over random unit directions, of the squared exact W2 of the projections.

    All images share the directions, which are drawn on the CPU from `seed`: values compare across images, methods and
    devices. O(N (D + log N)) a projection.

    Raises:
        ValueError: as `gaussian_w2`, and if projections < 1.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    full_BND, kept_BKD = _both_sets(features, idx)
    generator = torch.Generator().manual_seed(seed)
    direction_DP = torch.randn(full_BND.shape[-1], projections, generator=generator, dtype=torch.float64)
    direction_DP = torch.nn.functional.normalize(direction_DP, dim=0).to(full_BND.device)

    full_BNP = (full_BND @ direction_DP).sort(dim=1).values
    kept_BKP = (kept_BKD @ direction_DP).sort(dim=1).values
    full_Q, kept_Q, weight_Q = _matched_quantiles(full_BNP.shape[1], kept_BKP.shape[1], full_BND.device)
    gap_BQP = full_BNP[:, full_Q] - kept_BKP[:, kept_Q]
    squared_BP = torch.einsum("q,bqp->bp", weight_Q, gap_BQP.square())
    return squared_BP.mean(-1).sqrt()


def exact_w2(features: Tensor, idx: Tensor) -> Tensor:
    """W2 between the two empirical distributions [B], by linear programming (POT), one image at a time.

    The solver runs on the CPU; the result is on the features' device.

    Raises:
        ImportError: if POT is not installed.
        ValueError: as `gaussian_w2`.
        RuntimeError: if the solver does not reach the optimum.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError("exact_w2 needs POT: pip install 'otprune[test]'") from error
    full_BND, kept_BKD = _both_sets(features, idx)
    costs_BNK = torch.cdist(full_BND, kept_BKD, compute_mode="donot_use_mm_for_euclid_dist").square()
    squared = []
    for cost_NK in costs_BNK.cpu().numpy():
        value, log = ot.emd2([], [], cost_NK, numItermax=10_000_000, log=True)  # empty weights: uniform
        if log["warning"] is not None:
            raise RuntimeError(f"exact transport did not converge: {log['warning']}")
        squared.append(float(value))
    return torch.tensor(squared, dtype=torch.float64, device=features.device).clamp_min(0).sqrt()


def _both_sets(features: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens [B, N, D] and the kept ones [B, K, D] in float64, after checking both arguments."""
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(f"features must be floating [B, N, D], got {features.dtype} {list(features.shape)}")
    if idx.ndim != 2 or idx.is_floating_point() or idx.dtype == torch.bool:
        raise ValueError(f"idx must be integer [B, K], got {idx.dtype} {list(idx.shape)}")
    if len(idx) != len(features) or idx.shape[1] < 1 or idx.device != features.device:
        raise ValueError(
            f"idx must be [{len(features)}, K >= 1] on {features.device}, got {list(idx.shape)} on {idx.device}"
        )
    if idx.numel() and (idx.min() < 0 or idx.max() >= features.shape[1]):
        raise ValueError(f"idx must be in [0, {features.shape[1]}), got [{int(idx.min())}, {int(idx.max())}]")
    if (idx.sort(dim=1).values.diff(dim=1) == 0).any():
        raise ValueError("idx must be distinct within each image, got duplicates")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or inf")
    full_BND = features.double()
    return full_BND, full_BND.gather(1, idx.long()[..., None].expand(-1, -1, features.shape[-1]))


def _centered(tokens_BND: Tensor) -> Tensor:
    return tokens_BND - tokens_BND.mean(dim=1, keepdim=True)


def _column_scale(tokens_BND: Tensor, center: bool) -> Tensor:
    """Root mean square of each column [B, 1, D], and 1 for a column of zeros.

    Centring a constant column leaves the rounding error of its mean instead of zeros; such a column counts as zero too.
    """
    noise_B1D = tokens_BND.new_zeros(())
    if center:
        noise_B1D = tokens_BND.mean(dim=1, keepdim=True).abs() * (8 * torch.finfo(tokens_BND.dtype).eps)
        tokens_BND = _centered(tokens_BND)
    rms_B1D = tokens_BND.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(rms_B1D > noise_B1D, rms_B1D, 1.0)


def _fidelity(full_BND: Tensor, kept_BKD: Tensor) -> Tensor:
    """tr (S^1/2 S_C S^1/2)^1/2 = ||V_C V'||_* / sqrt(N K)."""
    cross_BKN = kept_BKD @ full_BND.mT
    nuclear_B = torch.linalg.svdvals(cross_BKN).sum(-1)
    return nuclear_B / math.sqrt(full_BND.shape[1] * kept_BKD.shape[1])


def _matched_quantiles(num_full: int, num_kept: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of [0, 1] on which both quantile functions are constant.

    Returns for each piece the row in the sorted full set and in the sorted kept set (int64 [Q] each), and its length
    (float64 [Q]). The pieces end at i/N and j/K. The code holds these ends as integers in units of 1/(N K), so that no
    piece is lost to rounding.
    """
    breaks_full = torch.arange(1, num_full + 1, device=device) * num_kept
    breaks_kept = torch.arange(1, num_kept + 1, device=device) * num_full
    ends_Q = torch.cat([breaks_full, breaks_kept]).unique()
    starts_Q = torch.cat([ends_Q.new_zeros(1), ends_Q[:-1]])
    weight_Q = (ends_Q - starts_Q).double() / (num_full * num_kept)
    return starts_Q // num_kept, starts_Q // num_full, weight_Q
