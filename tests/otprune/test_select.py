"""The front door: its contract, its errors, and what holds for every method."""

import math

import pytest
import torch

from otprune import METHODS, num_kept, select_tokens


def tokens(num_images: int = 2, num_tokens: int = 24, width: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, num_tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 7, 24])
def test_every_method_returns_k_distinct_ascending_indices(method, k):
    keep = select_tokens(tokens(), k, method=method)
    assert keep.dtype == torch.int64
    assert keep.shape == (2, k)
    assert ((keep >= 0) & (keep < 24)).all()
    assert (keep.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_returns_everything(method):
    assert select_tokens(tokens(), 24, method=method).tolist() == [list(range(24))] * 2


@pytest.mark.parametrize("method", METHODS)
def test_batching_does_not_change_the_answer(method):
    features, seeds = tokens(5), torch.tensor([3, -1, 2**62, 0, 3])
    together = select_tokens(features, 7, method=method, seed=seeds)
    for i in range(5):
        alone = select_tokens(features[i : i + 1], 7, method=method, seed=seeds[i : i + 1])
        assert alone.tolist() == together[i : i + 1].tolist()


@pytest.mark.parametrize(
    "method", ["otprune", "otprune_centered", "logdet_linear", "logdet_linear_centered", "divprune"]
)
def test_permuting_the_tokens_permutes_the_answer(method):
    features = tokens(1).double()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    permuted = select_tokens(features[:, order], 9, method=method)
    assert order[permuted[0]].sort().values.tolist() == select_tokens(features, 9, method=method)[0].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_accepted_and_decided_in_float32(method, dtype):
    features = tokens().to(dtype)
    expected = select_tokens(features.to(torch.promote_types(dtype, torch.float32)), 7, method=method)
    assert select_tokens(features, 7, method=method).tolist() == expected.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(1, 24, 10),
        torch.full((1, 24, 10), 1 / 3),
        tokens(1, 4).repeat(1, 6, 1),
        torch.cat([torch.zeros(1, 20, 10), tokens(1, 4)], dim=1),
        tokens(1) * 1e30,
        tokens(1) * 1e-30,
        torch.zeros(1, 24, 0),
    ],
    ids=["zero", "constant", "duplicate", "mostly zero", "huge", "minute", "no width"],
)
def test_degenerate_tokens_still_give_distinct_picks(method, features):
    for k in (1, 9, 24):
        keep = select_tokens(features, k, method=method)
        assert (keep.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_gives_an_empty_answer(method):
    assert select_tokens(torch.zeros(0, 24, 10), 7, method=method).shape == (0, 7)


def test_the_input_is_left_as_it_was():
    features = tokens()
    before = features.clone()
    for method in METHODS:
        select_tokens(features, 7, method=method)
    assert torch.equal(features, before)


def test_a_common_scale_of_the_features_does_not_matter():
    for method in ("otprune", "logdet_linear_centered", "divprune"):
        plain = select_tokens(tokens(), 7, method=method)
        assert select_tokens(tokens() * 2.0**70, 7, method=method).tolist() == plain.tolist()
        assert select_tokens(tokens() * 2.0**-70, 7, method=method).tolist() == plain.tolist()


def test_gamma_none_is_each_scales_documented_default():
    features = tokens(4, 40, 64)
    for scale, gamma in {"released": 0.01, "paper": 0.01, "trace": 0.5}.items():
        default = select_tokens(features, 9, gamma_scale=scale)
        assert default.tolist() == select_tokens(features, 9, gamma=gamma, gamma_scale=scale).tolist()
    default = select_tokens(features, 9, method="logdet_linear")
    assert default.tolist() == select_tokens(features, 9, method="logdet_linear", gamma=1.0).tolist()


def test_a_callable_selects_in_any_order():
    keep = select_tokens(tokens(), 3, method=lambda features, k: torch.tensor([[5, 1, 3], [0, 23, 2]]))
    assert keep.tolist() == [[1, 3, 5], [0, 2, 23]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": tokens()[0]}, r"features must be \[images, tokens, width\], got shape \[24, 10\]"),
        ({"features": tokens().int()}, "features must be floating point, got torch.int32"),
        ({"features": tokens().index_fill(1, torch.tensor([3]), math.nan)}, "features must be finite, got NaN"),
        ({"features": tokens().index_fill(1, torch.tensor([3]), math.inf)}, "features must be finite, got inf"),
        ({"features": tokens().index_fill(1, torch.tensor([3]), -math.inf)}, "features must be finite, got inf"),
        ({"k": 0}, r"k must be in \[1, 24\] \(the number of tokens\), got 0"),
        ({"k": 25}, r"k must be in \[1, 24\] \(the number of tokens\), got 25"),
        ({"k": 2.5}, "k must be an integer, got 2.5"),
        ({"method": "otprun"}, "method must be a callable or one of otprune, .*, got 'otprun'"),
        ({"gamma_scale": "mean"}, "gamma_scale must be one of released, paper, trace, got 'mean'"),
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ({"gamma": math.nan}, "gamma must be positive and finite, got nan"),
        ({"seed": torch.tensor([1, 2, 3])}, r"seed must be an int or int64 \[2\], got torch.int64 \[3\]"),
        ({"seed": torch.tensor([1.0, 2.0])}, r"seed must be an int or int64 \[2\], got torch.float32 \[2\]"),
        ({"method": lambda features, k: torch.zeros(2, k + 1, dtype=torch.int64)}, r"must return int64 \[2, 5\]"),
        ({"method": lambda features, k: torch.zeros(2, k, dtype=torch.int64)}, "must return distinct indices"),
        (
            {"method": lambda features, k: torch.arange(k).repeat(2, 1) + 20},
            r"must return distinct indices in \[0, 24\)",
        ),
    ],
)
def test_a_users_mistake_is_named(changes, message):
    call = {"features": tokens(), "k": 5} | changes
    with pytest.raises(ValueError, match=message):
        select_tokens(call.pop("features"), call.pop("k"), **call)


@pytest.mark.parametrize(
    ("retention", "num_tokens", "k"),
    [
        *[(0.098, 576, 56), (0.098, 2880, 282), (0.05, 576, 29), (0.15, 576, 86), (0.2, 576, 115), (1.0, 576, 576)],
        *[(0.001, 576, 1), (0.5, 5, 2), (0.5, 7, 4)],  # Python rounds halves to even
    ],
)
def test_retention_becomes_a_count_by_pythons_rounding(retention, num_tokens, k):
    assert num_kept(retention, num_tokens) == k


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.1, math.nan])
def test_a_retention_outside_zero_to_one_is_refused(retention):
    with pytest.raises(ValueError, match=r"retention must be in \(0, 1\]"):
        num_kept(retention, 576)
