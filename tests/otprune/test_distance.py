"""The distances between kept and all tokens, tested where theory says what they are."""

import functools
import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from otprune.distance import exact_w2, gaussian_w2, sliced_w2, trace_objective

# Everything runs in float64; matrix square roots of well-conditioned matrices lose about half of its 16 digits.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}

needs_pot = pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="POT is not installed")


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subsets(num_images: int, num_tokens: int, keep: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_tokens, generator=generator)[:keep] for _ in range(num_images)])


def second_moment(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / len(rows)


def trace_by_matrix_roots(full: np.ndarray, kept: np.ndarray) -> float:
    """Paper Eq. 4 without the square, as it is written."""
    root = sqrtm(second_moment(full))
    return float(np.trace(sqrtm(root @ second_moment(kept) @ root)).real)


def one_dimensional_w2(a: list[float], b: list[float]) -> float:
    """Both sets repeated to a common length, sorted, paired: the definition for uniform weights on a line."""
    length = math.lcm(len(a), len(b))
    pairs = zip(sorted(a * (length // len(a))), sorted(b * (length // len(b))), strict=True)
    return math.sqrt(sum((x - y) ** 2 for x, y in pairs) / length)


def pick(features: Tensor, idx: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(v.numpy(), v[i].numpy()) for v, i in zip(features, idx, strict=True)]


@pytest.mark.parametrize(("num_tokens", "width", "keep"), [(40, 6, 12), (30, 5, 7)])
def test_trace_objective_is_the_trace_of_the_matrix_square_root(num_tokens, width, keep):
    features, idx = tokens(3, num_tokens, width), subsets(3, num_tokens, keep)
    expected = torch.tensor([trace_by_matrix_roots(v, c) for v, c in pick(features, idx)], dtype=torch.float64)
    torch.testing.assert_close(trace_objective(features, idx), expected, **CLOSE)
    torch.testing.assert_close(trace_objective(features, idx, squared=True), expected**2, **CLOSE)


def test_trace_objective_centers_each_set_about_its_own_mean():
    features, idx = tokens(2, 30, 4) + 5, subsets(2, 30, 9)
    expected = [trace_by_matrix_roots(v - v.mean(0), c - c.mean(0)) for v, c in pick(features, idx)]
    actual = trace_objective(features, idx, center=True)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("center", [False, True])
def test_normalized_columns_make_the_objective_of_everything_the_width_and_ignore_column_scales(center):
    features, idx = tokens(2, 50, 6) + 1, subsets(2, 50, 10)
    everything = torch.arange(50).expand(2, -1)
    whole = trace_objective(features, everything, center=center, normalize_columns=True)
    torch.testing.assert_close(whole, torch.full((2,), 6.0, dtype=torch.float64), **CLOSE)  # tr S = D
    scaled = features * torch.tensor([1.0, 2.0, 30.0, 0.4, 5.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(
        trace_objective(scaled, idx, center=center, normalize_columns=True),
        trace_objective(features, idx, center=center, normalize_columns=True),
        **CLOSE,
    )


def test_columns_of_unit_length_only_divide_the_normalized_objective_by_the_number_of_tokens():
    features, idx = tokens(2, 50, 6), subsets(2, 50, 10)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        trace_objective(unit, idx), trace_objective(features, idx, normalize_columns=True) / 50, **CLOSE
    )


@pytest.mark.parametrize("center", [False, True])
def test_gaussian_w2_is_the_bures_formula_of_fitted_moments(center):
    features, idx = tokens(3, 40, 5) + 0.7, subsets(3, 40, 11)
    expected = []
    for full, kept in pick(features, idx):
        gap = np.sum((full.mean(0) - kept.mean(0)) ** 2) if center else 0.0
        if center:
            full, kept = full - full.mean(0), kept - kept.mean(0)
        traces = np.trace(second_moment(full)) + np.trace(second_moment(kept))
        expected.append(math.sqrt(gap + traces - 2 * trace_by_matrix_roots(full, kept)))
    actual = gaussian_w2(features, idx, center=center)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_one_dimensional_gaussian_w2_is_the_gap_of_means_and_deviations():
    features, idx = tokens(4, 60, 1) * 3 + 2, subsets(4, 60, 13)
    kept = features.gather(1, idx[..., None])
    means = (features.mean(1) - kept.mean(1))[:, 0]
    deviations = (features.std(1, correction=0) - kept.std(1, correction=0))[:, 0]
    torch.testing.assert_close(gaussian_w2(features, idx, center=True), torch.hypot(means, deviations), **CLOSE)
    roots = (features.square().mean(1).sqrt() - kept.square().mean(1).sqrt())[:, 0].abs()
    torch.testing.assert_close(gaussian_w2(features, idx), roots, **CLOSE)


def test_with_unit_variance_minimising_gaussian_w2_is_maximising_the_trace():
    features, idx = tokens(1, 40, 6), subsets(50, 40, 9)
    distance = gaussian_w2(features.expand(50, -1, -1), idx, unit_variance=True)
    full_and_kept = [
        (v / np.sqrt(np.mean(v**2, 0)), c / np.sqrt(np.mean(c**2, 0)))
        for v, c in pick(features.expand(50, -1, -1), idx)
    ]
    trace = torch.tensor([trace_by_matrix_roots(v, c) for v, c in full_and_kept], dtype=torch.float64)
    torch.testing.assert_close(distance.square(), 2 * 6 - 2 * trace, **CLOSE)  # both traces are D = 6


def test_unit_variance_ignores_column_scales():
    features, idx = tokens(2, 40, 5) + 1, subsets(2, 40, 9)
    scaled = features * torch.tensor([1.0, 20.0, 0.3, 4.0, 5.0], dtype=torch.float64)
    for center in (False, True):
        torch.testing.assert_close(
            gaussian_w2(scaled, idx, center=center, unit_variance=True),
            gaussian_w2(features, idx, center=center, unit_variance=True),
            **CLOSE,
        )


def test_a_constant_zero_column_does_not_make_nan():
    features, idx = tokens(2, 30, 4), subsets(2, 30, 6)
    features[..., 2] = 0
    assert gaussian_w2(features, idx, center=True, unit_variance=True).isfinite().all()
    assert trace_objective(features, idx, normalize_columns=True).isfinite().all()


@pytest.mark.parametrize("value", [1 / 3, 0.1, 1000 / 7, -1e-8 / 3])
def test_columns_of_one_value_add_nothing_to_what_is_centred(value):
    """Their mean rounds, and what that leaves of them is no variance to divide by."""
    features, idx = tokens(2, 576, 8), subsets(2, 576, 56)
    wider = torch.cat([features, torch.full((2, 576, 4), value, dtype=torch.float64)], dim=-1)
    for measure in (
        functools.partial(gaussian_w2, center=True, unit_variance=True),
        functools.partial(trace_objective, center=True, normalize_columns=True),
    ):
        torch.testing.assert_close(measure(wider, idx), measure(features, idx), **CLOSE)


@needs_pot
@pytest.mark.parametrize(("num_tokens", "keep"), [(24, 7), (20, 5), (13, 1)])
def test_on_a_line_exact_and_sliced_w2_are_the_quantile_formula(num_tokens, keep):
    features, idx = tokens(3, num_tokens, 1), subsets(3, num_tokens, keep)
    expected = [one_dimensional_w2(v[:, 0].tolist(), c[:, 0].tolist()) for v, c in pick(features, idx)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(exact_w2(features, idx), expected, **CLOSE)
    torch.testing.assert_close(sliced_w2(features, idx, projections=3), expected, **CLOSE)


@needs_pot
def test_exact_w2_to_one_token_is_the_root_mean_square_distance_to_it():
    features, idx = tokens(2, 25, 6), torch.tensor([[3], [8]])
    gap = features - features.gather(1, idx[..., None].expand(-1, -1, 6))
    torch.testing.assert_close(exact_w2(features, idx), gap.square().sum(-1).mean(-1).sqrt(), **CLOSE)


@needs_pot
def test_exact_w2_of_clusters_is_the_way_to_the_nearest_kept_center():
    """Three far clusters of equal mass, one token kept in each: all mass travels inside its cluster."""
    centers = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], dtype=torch.float64).repeat_interleave(4, 0)
    features = (centers + tokens(12, 2))[None]
    idx = torch.tensor([[1, 5, 9]])
    expected = (features[0] - features[0, idx[0]].repeat_interleave(4, 0)).square().sum(-1).mean().sqrt()
    torch.testing.assert_close(exact_w2(features, idx)[0], expected, **CLOSE)


def mixture_and_shift(shift: Tensor, num_tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A cloud and its translated copy; the copy is kept. All tokens = half cloud, half copy."""
    cloud = tokens(num_tokens, len(shift))
    return torch.cat([cloud, cloud + shift])[None], torch.arange(num_tokens, 2 * num_tokens)[None]


@needs_pot
def test_far_translation_moves_half_the_mass_by_the_shift_in_every_distance():
    """Half of all tokens must travel by t, so W2 nears |t| / sqrt 2 when t is far longer than the cloud is wide."""
    shift = torch.tensor([300.0, 400.0, 0.0], dtype=torch.float64)
    features, idx = mixture_and_shift(shift)
    torch.testing.assert_close(exact_w2(features, idx)[0].item(), 500 / math.sqrt(2), rtol=1e-2, atol=0)
    mean_aware = gaussian_w2(features, idx, center=True)[0].item()
    # Gaussians: means 250 apart, and the mixture's spread of 250 along t against the cloud's of about 1.
    torch.testing.assert_close(mean_aware, math.hypot(250, 250), rtol=1e-2, atol=0)


@needs_pot
def test_translating_all_tokens_changes_only_the_zero_mean_distance():
    features, idx = tokens(2, 30, 4), subsets(2, 30, 8)
    moved = features + torch.tensor([10.0, -20.0, 5.0, 7.0], dtype=torch.float64)
    for distance in (exact_w2, sliced_w2, lambda f, i: gaussian_w2(f, i, center=True)):
        torch.testing.assert_close(distance(moved, idx), distance(features, idx), **CLOSE)
    assert ((gaussian_w2(moved, idx) - gaussian_w2(features, idx)).abs() > 1e-2).all()


def gaussian_kept_from_gaussian(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens from N(0, I) thinned with probability q/p to a kept set from q = N(mean, diag(spread^2)) in the plane."""
    mean, spread = torch.tensor([0.5, 0.0], dtype=torch.float64), torch.tensor([0.5, 0.8], dtype=torch.float64)
    features = tokens(num_tokens, 2, seed=1)
    log_ratio = (features.square() - ((features - mean) / spread).square()).sum(-1) / 2
    highest = (mean.square() / (1 - spread.square())).sum() / 2  # of log_ratio over the plane
    accept = torch.rand(num_tokens, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return features[None], (accept.log() < log_ratio - highest).nonzero().T


@pytest.mark.slow
@needs_pot
def test_exact_w2_of_many_gaussian_samples_nears_the_gaussian_formula():
    excess = []
    for num_tokens in (150, 2400):
        features, idx = gaussian_kept_from_gaussian(num_tokens)
        fitted, exact = gaussian_w2(features, idx, center=True).item(), exact_w2(features, idx).item()
        assert fitted <= exact  # Gelbrich: no W2 is below that of the Gaussians with the same moments
        excess.append(exact / fitted - 1)
    assert excess[1] < min(excess[0] / 2, 0.05)
    truth = math.hypot(0.5, 1 - 0.5, 1 - 0.8)  # between the two laws: means, then deviations
    assert fitted == pytest.approx(truth, rel=0.1)  # about 800 kept samples


def test_keeping_every_token_gives_no_distance_and_the_whole_trace():
    features = tokens(2, 20, 5)
    everything = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    zero = torch.zeros(2, dtype=torch.float64)
    distances = [
        gaussian_w2(features, everything),
        gaussian_w2(features, everything, center=True),
        gaussian_w2(features, everything, unit_variance=True),
        sliced_w2(features, everything),
    ]
    for distance in distances:
        # The square is a difference of two traces near 5: 1e-15 off, so its root is 1e-7 off.
        torch.testing.assert_close(distance, zero, rtol=0, atol=2e-7)
    whole = features.square().sum(-1).mean(-1)
    torch.testing.assert_close(trace_objective(features, everything), whole, **CLOSE)


@needs_pot
def test_keeping_every_token_gives_no_exact_distance():
    assert exact_w2(tokens(1, 20, 5), torch.arange(20)[None]).item() == 0


@needs_pot
def test_distances_scale_with_the_features_and_the_trace_with_their_square():
    features, idx = tokens(2, 30, 4), subsets(2, 30, 7)
    for distance in (gaussian_w2, sliced_w2, exact_w2):
        torch.testing.assert_close(distance(3 * features, idx), 3 * distance(features, idx), **CLOSE)
    torch.testing.assert_close(trace_objective(3 * features, idx), 9 * trace_objective(features, idx), **CLOSE)


@needs_pot
def test_distances_ignore_rotations_and_the_order_of_tokens():
    features, idx = tokens(1, 30, 4), subsets(1, 30, 7)
    rotation = torch.linalg.qr(tokens(4, 4, seed=9)).Q
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    moved_idx = permutation.argsort()[idx].flip(1)
    for measure in (trace_objective, gaussian_w2, exact_w2):
        expected = measure(features, idx)
        torch.testing.assert_close(measure(features @ rotation, idx), expected, **CLOSE)
        torch.testing.assert_close(measure(features[:, permutation], moved_idx), expected, **CLOSE)
    torch.testing.assert_close(sliced_w2(features[:, permutation], moved_idx), sliced_w2(features, idx), **CLOSE)


@needs_pot
def test_sliced_w2_is_below_exact_w2_and_repeats_with_its_seed():
    features, idx = tokens(3, 40, 6), subsets(3, 40, 8)
    sliced = sliced_w2(features, idx, projections=200, seed=4)
    assert (sliced <= exact_w2(features, idx)).all()  # no projection lengthens a transport plan
    assert torch.equal(sliced, sliced_w2(features, idx, projections=200, seed=4))
    assert not torch.equal(sliced, sliced_w2(features, idx, projections=200, seed=5))


def test_sliced_w2_of_an_isotropic_translation_is_the_shift_over_the_root_of_the_width():
    """One token kept and one elsewhere: |projection|^2 averages to |t|^2 / D over directions; half the mass moves."""
    width = 8
    features = torch.zeros(1, 2, width, dtype=torch.float64)
    features[0, 1, 0] = 10.0
    actual = sliced_w2(features, torch.tensor([[1]]), projections=20_000).item()
    assert actual == pytest.approx(10 / math.sqrt(2 * width), rel=0.02)  # 3 standard errors of 20,000 draws
