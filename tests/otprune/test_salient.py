"""Coverage weighted by saliency: each method equals its formula, and the knob's ends are what they are called."""

import pytest
import torch
from torch.nn.functional import normalize

from otprune import kernel, select_tokens
from otprune.methods import get_method
from otprune.methods.reduction import Seen
from otprune.methods.salient.logdet import logdet_salient
from otprune.methods.salient.saliency import energy, normalised
from otprune.methods.salient.scope import scope
from otprune.methods.salient.score import score

NAMES = ("logdet_salient", "scope", "score")


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """(features [2, 30, 8], saliency [2, 30])."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)
    return features, torch.rand(2, 30, generator=generator, dtype=torch.float64)


def cosines(features_ND: torch.Tensor) -> torch.Tensor:
    unit_ND = normalize(features_ND, dim=-1)
    return unit_ND @ unit_ND.T


def greedy(objective, num_tokens: int, k: int) -> list[int]:
    """The picks of a literal greedy: `objective(picks, i)` scores each token i that is not picked."""
    picks: list[int] = []
    for _ in range(k):
        left = [i for i in range(num_tokens) if i not in picks]
        picks.append(max(left, key=lambda i: (float(objective(picks, i)), -i)))
    return picks


@pytest.mark.parametrize("whole_kernel", [4096, 0])
def test_scope_takes_what_covers_most_of_what_is_not_yet_covered(tokens, whole_kernel, monkeypatch):
    monkeypatch.setattr(kernel, "WHOLE_KERNEL", whole_kernel)
    for features, saliency, picks in zip(*tokens, scope(tokens[0], 12, tokens[1], alpha=0.7), strict=True):
        c = cosines(features)

        def gain(picked: list[int], i: int, c=c, s=saliency) -> torch.Tensor:
            covered = c[picked].amax(dim=0).clamp_min(0) if picked else torch.zeros(len(c))
            return (c[i] - covered).clamp_min(0).sum() * s[i] ** 0.7

        assert picks.tolist() == greedy(gain, 30, 12)


def test_score_takes_the_salient_token_that_is_farthest_from_the_picks(tokens):
    for features, saliency, picks in zip(*tokens, score(tokens[0], 12, tokens[1]), strict=True):
        c = cosines(features)

        def distance(picked: list[int], i: int, c=c, s=saliency) -> torch.Tensor:
            return ((1 - c[i, picked]).amin() if picked else 1) * s[i] ** 0.8

        assert picks.tolist() == greedy(distance, 30, 12)


def test_logdet_salient_weighs_each_token_of_otprunes_kernel(tokens):
    theta = 0.4
    for features, saliency, picks in zip(
        *tokens, logdet_salient(tokens[0], 6, normalised(tokens[1]), theta=theta), strict=True
    ):
        columns = features / features.norm(dim=0)
        G = columns @ columns.T
        weight = (saliency / saliency.mean()) ** (theta / (2 * (1 - theta)))
        K = torch.eye(30) + 0.5 / G.diagonal().mean() ** 2 * (weight[:, None] * G @ G * weight)
        assert picks.tolist() == greedy(lambda picked, i, K=K: torch.logdet(K[[*picked, i]][:, [*picked, i]]), 30, 6)


def test_the_knobs_ends_are_coverage_alone_and_saliency_alone(tokens):
    features, saliency = tokens[0], normalised(tokens[1])
    coverage = select_tokens(features, 7, gamma=0.5, gamma_scale="trace")
    assert torch.equal(logdet_salient(features, 7, saliency, theta=0).sort().values, coverage)
    assert torch.equal(logdet_salient(features, 7, saliency, theta=1), saliency.topk(7).indices)
    even = torch.ones_like(saliency)
    assert torch.equal(scope(features, 7, saliency, alpha=0), scope(features, 7, even))
    assert torch.equal(score(features, 7, saliency, beta=0), score(features, 7, even))


def test_energy_is_a_tokens_share_of_its_pictures_variance(tokens):
    features, _ = tokens
    centred = features - features.mean(dim=1, keepdim=True)
    expected = (centred / centred.norm(dim=1, keepdim=True)).square().sum(-1)
    torch.testing.assert_close(energy(features), expected)
    torch.testing.assert_close(normalised(energy(features)).mean(dim=-1), torch.ones(2, dtype=torch.float64))
    assert normalised(energy(torch.ones(1, 5, 3))).tolist() == [[1] * 5]  # nothing stands out


@pytest.mark.parametrize("name", NAMES)
def test_without_a_class_token_saliency_is_the_energy(name, tokens):
    features, _ = tokens
    method = get_method(name)
    seen = {"features": features, "seeds": torch.zeros(2, dtype=torch.int64), "prompts": [[""], [""]]}
    reduce = method.build(method.check({}), {})
    measured = [reduced.source.tolist() for [reduced] in reduce(Seen(**seen), 6)]
    given = [reduced.source.tolist() for [reduced] in reduce(Seen(**seen, saliency=energy(features)), 6)]
    assert measured == given
    assert all(picked == sorted(set(picked)) for picked in measured)


@pytest.mark.parametrize("choose", [logdet_salient, scope, score])
def test_equal_and_zero_tokens_still_give_distinct_picks(choose):
    for features in (torch.zeros(1, 9, 4), torch.ones(1, 9, 4)):
        assert choose(features, 9, torch.ones(1, 9)).unique().numel() == 9


@pytest.mark.parametrize(
    ("choose", "settings", "expected"),
    [
        (logdet_salient, {"theta": 1.5}, r"theta must be in \[0, 1\], got 1.5"),
        (scope, {"alpha": -1}, "alpha must be at least 0, got -1"),
        (score, {"beta": float("nan")}, "beta must be at least 0, got nan"),
    ],
)
def test_a_wrong_setting_or_shape_is_named(choose, settings, expected, tokens):
    with pytest.raises(ValueError, match=expected):
        choose(*[tokens[0], 3, tokens[1]], **settings)
    with pytest.raises(ValueError, match=r"saliency must be \[2, 30\], got \[2, 29\]"):
        choose(tokens[0], 3, tokens[1][:, 1:])
