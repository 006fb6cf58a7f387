"""Captions without references, and what is more than chance: agreement, loops, the canary, intervals, tests."""

import itertools
import math

import numpy as np
import pytest

from pipelines.metrics.agreement import agreement, canary, health
from pipelines.metrics.bootstrap import bootstrap, percentile_interval, resampled_sums
from pipelines.metrics.compare import mcnemar_p, wilcoxon_p
from pipelines.metrics.repetition import is_loop, loop_turns, pieces, repeated_share

CAPTIONS = {
    "a": "A red bus drives down the street.",
    "b": "Two dogs play with a ball in the grass.",
    "c": "A cat sleeps on a warm laptop.",
}


def test_agreement_with_itself_is_perfect():
    values = agreement(CAPTIONS, CAPTIONS)
    assert [values["exact_match"][key] for key in CAPTIONS] == [1, 1, 1]
    assert [values["extra_tokens"][key] for key in CAPTIONS] == [0, 0, 0]
    assert all(score == pytest.approx(1.0) for score in values["rouge_l"].values())
    assert all(score == pytest.approx(10.0) for score in values["cider"].values())


def test_agreement_ignores_case_and_the_final_dot_and_sees_the_rest():
    others = {**CAPTIONS, "a": "a red bus drives down the street", "b": "Two dogs play."}
    values = agreement(CAPTIONS, others)
    assert values["exact_match"] == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert values["extra_tokens"] == {"a": 0.0, "b": 6.0, "c": 0.0}
    assert values["cider"]["b"] < values["cider"]["c"]
    assert values["rouge_l"]["b"] < 1.0


def test_agreement_wants_the_same_images():
    with pytest.raises(ValueError, match="same ids"):
        agreement(CAPTIONS, {"a": "x"})


def test_health_counts_each_ailment():
    captions = ["a dog", "", "a bus a bus a bus", "a dog"]
    found = health(captions, ["stop", "stop", "length", "stop"])
    assert found["empty"] == 0.25
    assert found["truncated"] == 0.25
    assert found["looping"] == 0.25
    assert found["distinct"] == 0.75
    assert found["mean_tokens"] == pytest.approx((2 + 0 + 6 + 2) / 4)
    assert found["repeated_4grams"] == pytest.approx((1 / 3) / 4)
    with pytest.raises(ValueError, match="one length"):
        health(["a"], [])


@pytest.mark.parametrize(
    ("caption", "turns"),
    [
        ("a dog on a mat", 1),
        ("a very very big dog", 1),  # not at the end
        ("a dog dog", 2),
        ("a bus . . . .", 4),
        ("the cat and the dog and the dog and the dog and the", 3),  # the last turn is cut
        ("", 1),
    ],
)
def test_loops_are_repetitions_at_the_end(caption: str, turns: int):
    assert loop_turns(pieces(caption)) == turns
    assert is_loop(caption) is (turns >= 3)


def test_loop_turns_is_what_trying_every_unit_finds():
    def by_trying(tokens):
        best = 1
        for period in range(1, min(12, len(tokens) // 2) + 1):
            for cut in range(period):  # length of the unfinished last turn
                unit = tokens[len(tokens) - cut - period : len(tokens) - cut]
                if cut and tokens[len(tokens) - cut :] != unit[:cut]:
                    continue
                turns, end = 0, len(tokens) - cut
                while end - period >= 0 and tokens[end - period : end] == unit:
                    turns, end = turns + 1, end - period
                best = max(best, turns)
        return best

    for length in range(9):
        for tokens in itertools.product("ab", repeat=length):
            assert loop_turns(list(tokens)) == by_trying(list(tokens)), tokens


def test_repeated_share_counts_ngrams_seen_before():
    assert repeated_share(["a", "b", "a", "b", "a", "b"], n=2) == pytest.approx(1 - 2 / 5)
    assert repeated_share(["a"], n=2) == 0.0
    with pytest.raises(ValueError, match="n must be at least 1"):
        repeated_share(["a"], n=0)


def test_the_canary_lives_if_captions_follow_the_pixels():
    blank = dict.fromkeys(CAPTIONS, "A blank image.")
    swapped = dict(zip(CAPTIONS, np.roll(list(CAPTIONS.values()), 1).tolist(), strict=True))
    bird = canary(CAPTIONS, blank, swapped)
    assert bird.saw_the_images
    assert (bird.same_as_blank, bird.same_as_swapped) == (0.0, 0.0)


def test_the_canary_dies_if_the_same_is_said_of_anything():
    fluent = dict.fromkeys(CAPTIONS, "A man riding a wave on a surfboard.")
    assert not canary(fluent, fluent, fluent).saw_the_images
    assert not canary(CAPTIONS, dict.fromkeys(CAPTIONS, "Nothing."), CAPTIONS).saw_the_images


def test_the_canary_checks_its_input():
    with pytest.raises(ValueError, match="same ids"):
        canary(CAPTIONS, CAPTIONS, {})
    with pytest.raises(ValueError, match="max_same"):
        canary(CAPTIONS, CAPTIONS, CAPTIONS, max_same=1.5)


def mean(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"mean": sums[..., 0] / sums[..., 1]}


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(size=2000)
    low, high = bootstrap(np.stack([values, np.ones_like(values)], axis=1), mean, resamples=4000)["mean"]
    half = 1.96 * values.std() / math.sqrt(len(values))
    # 4,000 resamples put each bound within 3% of the half width (standard error), so 10% is three of them
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_bootstrap_is_the_same_for_the_same_seed_and_draws_whole_groups():
    statistics = np.stack([np.arange(10.0), np.ones(10)], axis=1)
    sums = resampled_sums(statistics, resamples=50, seed=3)
    np.testing.assert_array_equal(sums, resampled_sums(statistics, resamples=50, seed=3))
    assert not np.array_equal(sums, resampled_sums(statistics, resamples=50, seed=4))
    assert (sums[:, 1] == 10).all()
    assert (sums[:, 0] == sums[:, 0].round()).all()


def test_resampling_in_pieces_gives_the_asked_number(monkeypatch: pytest.MonkeyPatch):
    statistics = np.random.default_rng(0).random((7, 2))
    whole = resampled_sums(statistics, resamples=23)
    monkeypatch.setattr("pipelines.metrics.bootstrap._DRAWS_AT_ONCE", 7 * 4)
    np.testing.assert_allclose(resampled_sums(statistics, resamples=23), whole)


def test_the_bootstrap_checks_its_input():
    with pytest.raises(ValueError, match="shape"):
        resampled_sums(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="resamples"):
        resampled_sums(np.zeros((1, 2)), resamples=0)
    with pytest.raises(ValueError, match="level"):
        percentile_interval(np.zeros(3), level=1.0)


def test_mcnemar_is_the_binomial_sum():
    won, lost, both = 9, 2, 30
    ours = np.array([1] * won + [0] * lost + [1] * both)
    theirs = np.array([0] * won + [1] * lost + [1] * both)
    by_hand = 2 * sum(math.comb(won + lost, k) for k in range(lost + 1)) / 2 ** (won + lost)
    assert mcnemar_p(ours, theirs) == pytest.approx(by_hand)
    assert mcnemar_p(ours, ours) == 1.0
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar_p(ours * 0.5, theirs)


def test_wilcoxon_is_the_count_of_sign_patterns():
    difference = np.array([1.0, -2.0, 3.0, 4.0, 5.0, 6.0, 0.0])
    ranks = np.arange(1, 7)
    seen = min(ranks[1], ranks.sum() - ranks[1])  # the one negative difference has rank 2
    patterns = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in itertools.product((0, 1), repeat=6)
    ]
    by_hand = 2 * sum(total <= seen for total in patterns) / 2**6
    assert wilcoxon_p(difference, np.zeros(7)) == pytest.approx(by_hand)
    assert wilcoxon_p(difference, difference) == 1.0
    with pytest.raises(ValueError, match="one length"):
        wilcoxon_p(np.zeros(2), np.zeros(3))
