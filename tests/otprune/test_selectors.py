"""Each selector against its definition, written here in float64 from the formula."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from otprune import select_tokens
from otprune.kernel import unit_columns
from otprune.methods.cdpruner import cdpruner
from otprune.methods.logdet_linear import logdet_linear
from otprune.methods.otprune import otprune


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_sets(num_tokens: int, width: int) -> dict[str, Tensor]:
    """Float64 tokens [N, D] of the kinds that real images mix."""
    outliers = randn(num_tokens, width)
    outliers[:: num_tokens // 4] *= 30
    return {
        "iid": randn(num_tokens, width),
        "low rank": randn(num_tokens, 3) @ randn(3, width, seed=1) + 2 + 0.05 * randn(num_tokens, width, seed=2),
        "clustered": randn(5, width).repeat(num_tokens // 5 + 1, 1)[:num_tokens]
        + 0.1 * randn(num_tokens, width, seed=3),
        "outlier norms": outliers,
        "duplicates": randn(num_tokens // 2, width).repeat(2, 1),
        "constant": torch.full((num_tokens, width), 1 / 3, dtype=torch.float64),
    }


def logdet(kernel: Tensor, subset: list[int]) -> float:
    return float(torch.linalg.slogdet(kernel[subset][:, subset]).logabsdet)


def greedy_by_definition(kernel: Tensor, k: int) -> list[int]:
    """argmax over the tokens left of log det of the subset with that token; a difference below rounding is a tie."""
    picked: list[int] = []
    for _ in range(k):
        values = {j: logdet(kernel, [*picked, j]) for j in range(len(kernel)) if j not in picked}
        picked.append(min(j for j, value in values.items() if value > max(values.values()) - 1e-9))
    return picked


def unit(tokens: Tensor, *, centered: bool = False) -> Tensor:
    tokens = tokens - tokens.mean(dim=0) if centered else tokens
    norm = tokens.norm(dim=0)
    return tokens / torch.where(norm > 1e-10, norm, math.inf)


def squared_kernel(tokens: Tensor, gamma: float, scale: str, k: int, *, centered: bool = False) -> Tensor:
    """Each scale as its definition says it, on its own normalisation of the columns."""
    num_tokens, vectors = len(tokens), unit(tokens, centered=centered)
    if scale == "paper":  # Eq. 8: gamma / (m k), columns of unit second moment
        gamma, vectors = gamma / (num_tokens * k), vectors * num_tokens**0.5
    gram = vectors @ vectors.T
    if scale == "trace" and gram.trace() > 0:
        gram = gram / gram.diagonal().mean()
    return torch.eye(num_tokens, dtype=torch.float64) + gamma * gram @ gram.T


def linear_kernel(tokens: Tensor, gamma: float, *, centered: bool = False) -> Tensor:
    vectors = unit(tokens, centered=centered)
    gram = vectors @ vectors.T
    mean = gram.diagonal().mean()
    return torch.eye(len(tokens), dtype=torch.float64) + (gamma * gram / mean if mean > 0 else 0 * gram)


KINDS = list(token_sets(8, 3))
SHAPES = [(26, 16, 7), (18, 40, 9), (20, 6, 13)]  # N, D, k: wider than long, longer than wide, k above the rank


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["released", "paper", "trace"])
@pytest.mark.parametrize("centered", [False, True])
def test_otprune_in_float64_picks_what_the_definition_picks(kind, shape, scale, centered):
    num_tokens, width, k = shape
    tokens = token_sets(num_tokens, width)[kind]
    gamma = 0.3 if scale == "trace" else 0.02
    kernel = squared_kernel(tokens, gamma, scale, k, centered=centered)
    picks = otprune(tokens[None], k, gamma=gamma, gamma_scale=scale, centered=centered)[0].tolist()
    assert_same_greedy(kernel, picks, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centered", [False, True])
def test_the_linear_kernel_row_by_row_picks_what_the_formed_kernel_picks(kind, shape, centered):
    num_tokens, width, k = shape
    tokens = token_sets(num_tokens, width)[kind]
    kernel = linear_kernel(tokens, 2.0, centered=centered)
    picks = logdet_linear(tokens[None], k, gamma=2.0, centered=centered)[0].tolist()
    assert_same_greedy(kernel, picks, k)


def assert_same_greedy(kernel: Tensor, picks: list[int], k: int) -> None:
    """Each pick gains, within rounding, as much as the best token would have: the same sequence, up to exact ties."""
    assert len(set(picks)) == k
    for step, pick in enumerate(picks):
        left = [j for j in range(len(kernel)) if j not in picks[:step]]
        best = max(logdet(kernel, [*picks[:step], j]) for j in left)
        assert logdet(kernel, [*picks[: step + 1]]) == pytest.approx(best, abs=1e-9), (step, pick)


@pytest.mark.parametrize("kind", ["iid", "low rank", "clustered", "outlier norms"])
@pytest.mark.parametrize("method", ["otprune", "otprune_centered", "logdet_linear", "logdet_linear_centered"])
def test_float32_reaches_the_objective_of_float64(kind, method):
    tokens = token_sets(72, 32)[kind]
    centered = method.endswith("centered")
    linear = method.startswith("logdet")
    kernel = (
        linear_kernel(tokens, 1.0, centered=centered)
        if linear
        else squared_kernel(tokens, 0.01, "released", 9, centered=centered)
    )
    exact = select_tokens(tokens[None], 9, method=method)[0].tolist()
    single = select_tokens(tokens[None].float(), 9, method=method)[0].tolist()
    assert exact == sorted(greedy_by_definition(kernel, 9))
    assert logdet(kernel, single) >= 0.9999 * logdet(kernel, exact)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("linear", [False, True])
def test_the_greedy_set_reaches_1_minus_1_over_e_of_the_best_set(seed, linear):
    tokens = randn(12, 6, seed=seed)
    kernel = linear_kernel(tokens, 1.0) if linear else squared_kernel(tokens, 0.5, "trace", 4)
    picks = (logdet_linear(tokens[None], 4) if linear else otprune(tokens[None], 4, gamma_scale="trace"))[0].tolist()
    best = max(logdet(kernel, list(subset)) for subset in combinations(range(12), 4))
    assert logdet(kernel, picks) >= (1 - 1 / math.e) * best


@pytest.mark.parametrize("centered", [False, True])
def test_the_linear_objective_is_monotone_and_submodular(centered):
    kernel = linear_kernel(randn(7, 4, seed=5), 3.0, centered=centered)
    subsets = [list(s) for size in range(6) for s in combinations(range(7), size)]
    for small in subsets:
        for new in set(range(7)) - set(small):
            gain = logdet(kernel, [*small, new]) - logdet(kernel, small)
            assert gain >= -1e-12
            for extra in set(range(7)) - {*small, new}:
                later = logdet(kernel, [*small, extra, new]) - logdet(kernel, [*small, extra])
                assert later <= gain + 1e-12


def test_the_linear_objective_is_the_log_determinant_of_the_design():
    """Sylvester: the k x k form that the greedy maximises is the D x D form that the docstring explains."""
    tokens = unit(randn(20, 6))
    subset = logdet_linear(tokens[None], 5)[0].tolist()
    mean = tokens.square().sum() / len(tokens)
    chosen = tokens[subset] / mean.sqrt()
    design = torch.linalg.slogdet(torch.eye(6, dtype=torch.float64) + chosen.T @ chosen).logabsdet
    assert logdet(linear_kernel(tokens, 1.0), subset) == pytest.approx(float(design), abs=1e-10)


def test_gamma_scales_agree_where_theory_says_so():
    num_tokens, width, k = 40, 64, 9
    features = randn(4, num_tokens, width)
    released = otprune(features, k, gamma=0.01)
    assert torch.equal(released, otprune(features, k, gamma=0.01 * k / num_tokens, gamma_scale="paper"))
    trace = 0.01 * (width / num_tokens) ** 2
    assert torch.equal(released, otprune(features, k, gamma=trace, gamma_scale="trace"))


def test_a_tiny_gamma_keeps_its_order():
    """As gamma falls log det(I + gamma M) becomes gamma tr(M): the picks become the largest diagonal entries."""
    tokens = randn(60, 30)
    gram = unit(tokens) @ unit(tokens).T
    largest = gram.square().sum(dim=0).topk(10).indices.sort().values
    keep = select_tokens(tokens[None].float(), 10, gamma=1e-9)[0]
    assert keep.tolist() == largest.tolist()


def test_zero_columns_are_ignored():
    features = randn(2, 30, 12)
    padded = torch.cat([features, features.new_zeros(2, 30, 5)], dim=-1)
    for scale in ("released", "paper", "trace"):
        assert torch.equal(otprune(padded, 9, gamma_scale=scale), otprune(features, 9, gamma_scale=scale))


def test_a_constant_column_is_ignored_once_centred():
    """The mean of float32 numbers is rounded: what is left of a constant column is noise, not a feature."""
    features = randn(2, 300, 12).float()
    padded = torch.cat([features, torch.full((2, 300, 3), 1 / 3)], dim=-1)
    assert (unit_columns(padded, centered=True)[..., 12:] == 0).all()
    assert torch.equal(logdet_linear(padded, 30, centered=True), logdet_linear(features, 30, centered=True))


def test_exact_ties_go_to_the_lowest_index():
    features = torch.eye(6).repeat(2, 1)[None]  # every pair (i, i + 6) is the same token, all orthogonal
    for method in ("otprune", "logdet_linear", "divprune"):
        assert select_tokens(features, 1, method=method).tolist() == [[0]]
    for method in ("otprune", "logdet_linear"):
        assert select_tokens(features, 6, method=method).tolist() == [[0, 1, 2, 3, 4, 5]]


def divprune_by_definition(tokens: Tensor, k: int) -> list[int]:
    unit_rows = [row / row.norm() for row in tokens]
    distance = [[1 - float(a @ b) for b in unit_rows] for a in unit_rows]
    everyone = range(len(tokens))
    picked = [max(everyone, key=lambda i: min(distance[i][j] for j in everyone if j != i))]
    while len(picked) < k:
        left = [j for j in everyone if j not in picked]
        picked.append(max(left, key=lambda j: min(distance[s][j] for s in picked)))
    return sorted(picked)


@pytest.mark.parametrize("kind", ["iid", "low rank", "clustered", "outlier norms"])
def test_divprune_picks_what_its_algorithm_picks(kind):
    tokens = token_sets(40, 24)[kind]
    for k in (1, 2, 9, 40):
        assert select_tokens(tokens[None], k, method="divprune")[0].tolist() == divprune_by_definition(tokens, k)


def test_positional_selectors_take_the_places_their_names_say():
    features = torch.zeros(1, 10, 2)
    assert select_tokens(features, 3, method="first").tolist() == [[0, 1, 2]]
    assert select_tokens(features, 3, method="last").tolist() == [[7, 8, 9]]
    assert select_tokens(features, 5, method="uniform").tolist() == [[1, 3, 5, 7, 9]]
    assert select_tokens(features, 1, method="uniform").tolist() == [[5]]


def test_random_depends_on_the_seed_alone():
    features = torch.zeros(3, 576, 1)
    seeds = torch.tensor([7, 2**62, -5])
    together = select_tokens(features, 56, method="random", seed=seeds)
    for i, seed in enumerate(seeds.tolist()):
        assert select_tokens(features[:1], 56, method="random", seed=seed).tolist() == together[i : i + 1].tolist()
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_random_is_nested_in_k():
    small, large = (select_tokens(torch.zeros(1, 99, 1), k, method="random", seed=4)[0].tolist() for k in (10, 11))
    assert set(small) < set(large)


def test_random_keeps_every_token_equally_often_and_pairs_independently():
    """Over 4000 seeds a token is kept 4000 k / N times; 5 standard deviations bound all counts but 1 run in 10^4."""
    num_seeds, num_tokens, k = 4000, 64, 16
    seeds = torch.arange(num_seeds)
    keep = select_tokens(torch.zeros(num_seeds, num_tokens, 1), k, method="random", seed=seeds)
    kept = torch.zeros(num_seeds, num_tokens).scatter_(1, keep, 1.0)
    share = k / num_tokens
    assert (kept.mean(dim=0) - share).abs().max() < 5 * math.sqrt(share * (1 - share) / num_seeds)
    pairs = (kept.T @ kept / num_seeds)[~torch.eye(num_tokens, dtype=torch.bool)]
    share = k * (k - 1) / (num_tokens * (num_tokens - 1))
    assert (pairs - share).abs().max() < 6 * math.sqrt(share * (1 - share) / num_seeds)


def cdpruner_kernel(tokens: Tensor, relevance: Tensor, theta: float | None) -> Tensor:
    unit_rows = tokens / tokens.norm(dim=-1, keepdim=True)
    weight = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    if theta is not None:
        weight = torch.exp(theta / (2 * (1 - theta)) * weight)
    return weight[:, None] * (unit_rows @ unit_rows.T) * weight


@pytest.mark.parametrize("kind", ["iid", "low rank", "clustered", "outlier norms"])
@pytest.mark.parametrize("theta", [None, 0.0, 0.5, 0.9])
def test_cdpruner_picks_what_its_kernel_says(kind, theta):
    tokens = token_sets(40, 60)[kind]
    relevance = randn(2, 40, seed=9)
    picks = cdpruner(tokens.expand(2, -1, -1), 12, relevance, theta=theta)
    for scores, picked in zip(relevance, picks.tolist(), strict=True):
        assert_same_greedy(cdpruner_kernel(tokens, scores, theta), picked, 12)


def test_cdpruner_goes_through_the_front_door():
    features, relevance = randn(3, 40, 24).float(), randn(3, 40, seed=1).float()
    keep = select_tokens(features, 12, method=partial(cdpruner, relevance=relevance))
    alone = select_tokens(features[1:2], 12, method=partial(cdpruner, relevance=relevance[1:2]))
    assert keep[1:2].tolist() == alone.tolist()
    assert cdpruner(features, 12, relevance).sort(dim=-1).values.tolist() == keep.tolist()


def test_cdpruner_prefers_relevance_among_equals():
    """Among orthogonal tokens diversity says nothing, so the most relevant are kept."""
    relevance = randn(1, 16, seed=2)
    keep = cdpruner(torch.eye(16, dtype=torch.float64)[None], 5, relevance)
    assert keep.tolist() == relevance.topk(5).indices.tolist()


def test_cdpruner_without_any_preference_is_diversity_alone():
    features = randn(1, 30, 40)
    flat = cdpruner(features, 9, torch.full((1, 30), 0.25, dtype=torch.float64))
    assert flat.tolist() == cdpruner(features, 9, randn(1, 30), theta=0.0).tolist()


def test_cdpruner_keeps_distinct_tokens_beyond_the_rank_of_its_kernel():
    for features in (randn(1, 30, 4).float(), torch.zeros(1, 30, 4), torch.ones(1, 30, 4)):
        assert cdpruner(features, 30, randn(1, 30).float())[0].unique().numel() == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relevance": torch.zeros(1, 9)}, r"relevance must be \[1, 30\], got \[1, 9\]"),
        ({"relevance": torch.zeros(1, 30), "theta": 1.0}, r"theta must be in \[0, 1\), got 1.0"),
    ],
)
def test_cdpruner_names_a_users_mistake(settings, message):
    with pytest.raises(ValueError, match=message):
        cdpruner(torch.zeros(1, 30, 4), 3, **settings)
