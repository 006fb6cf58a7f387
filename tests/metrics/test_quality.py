"""Captions without references, and what is more than chance: agreement, loops, the canary, intervals, tests."""

import itertools
import math
import random

import numpy as np
import pytest

from demo.language import references
from demo.world import scene_at
from pipelines.metrics.agreement import agreement, canary, health
from pipelines.metrics.bootstrap import bootstrap, percentile_interval, resampled_sums
from pipelines.metrics.compare import mcnemar_p, wilcoxon_p
from pipelines.metrics.repetition import MIN_REPEATED, is_loop, loop_period, repeated_share

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
    captions = ["a dog", "", "a bus " * 8, "a dog"]
    found = health(captions, ["stop", "stop", "length", "stop"])
    assert found["empty"] == 0.25
    assert found["truncated"] == 0.25
    assert found["looping"] == 0.25
    assert found["distinct"] == 0.75
    assert found["mean_tokens"] == pytest.approx((2 + 0 + 16 + 2) / 4)
    assert found["repeated_4grams"] == pytest.approx((11 / 13) / 4)
    with pytest.raises(ValueError, match="one length"):
        health(["a"], [])


LOOPS = {
    "the last turn is cut": "a cat and the dog and the dog and the dog and the dog and the dog and the",
    "within a word": "a cat and the dog and the dog and the dog and the dog and the dog and the do",
    "one word": "a bus" + " red" * 13,
    "dots": "a bus" + " ." * 13,
    "letters without spaces": "a code 7" + "0" * 60,
    "a script without spaces": "\u7ea2\u8272\u7684\u732b" + "\u7684\u732b" * 8,
    "closed as JSON": '{"caption": "a cat' + ", a cat" * 12 + '"}',
    "long sentences": "A cat. " + "The sign behind the counter of the shop reads open until ten in the evening. " * 3,
}
NO_LOOPS = {
    "plain": "a dog on a mat",
    "empty": "",
    "speech": "a very, very, very, very big dog",
    "a sign": "The sign says no no no no no no no no no no no no",
    "not at the end": "red " * 40 + "is written on the wall behind the two men",
    "few turns": "a red ball and a red ball and a red ball",
    "two sentences": "The sign behind the counter of the shop reads open until ten in the evening. " * 2,
    "one pattern": " ".join(f"On the {side} there is a small red circle." for side in ("left", "right", "top", "rim")),
    "a list": "\n".join(f"{i}. a {color} car" for i, color in enumerate(("red", "blue", "red", "blue", "red"), 1)),
    "equal items": "\n".join(f"{i}. a red car" for i in range(1, 12)),
    "Markdown": "**Objects**\n\n- a dog\n- a dog\n- a dog\n\n| name | number |\n|---|---|\n| dog | 3 |",
    "ellipsis and rule": "and so on......\n----------",
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_one_phrase_again_and_again_at_the_end(name: str):
    assert is_loop(LOOPS[name])


@pytest.mark.parametrize("name", NO_LOOPS)
def test_what_people_repeat_is_no_loop(name: str):
    assert not is_loop(NO_LOOPS[name])


def test_no_true_caption_of_the_demo_world_is_a_loop():
    """Neither one caption nor the four of a scene in one text, 80 words on average."""
    texts = [references(scene_at("corpus", i)) for i in range(2000)]
    assert not [text for four in texts for text in (*four, " ".join(four)) if is_loop(text)]
    assert np.mean([len(" ".join(four).split()) for four in texts]) > 60


def test_the_period_of_a_loop_is_what_trying_every_phrase_finds():
    def by_trying(tokens: str) -> int:
        for period in range(1, len(tokens) + 1):
            length = period + max(2 * period, MIN_REPEATED)
            end = tokens[-length:]
            if len(end) == length and end == (end[:period] * length)[:length]:
                return period
        return 0

    rng, found = random.Random(0), []
    for _ in range(2000):
        phrase = "".join(rng.choices("ab", k=rng.randint(1, 9)))
        tokens = "".join(rng.choices("ab", k=rng.randint(0, 5))) + (phrase * 20)[: rng.randint(0, 40)]
        found.append(by_trying(tokens))
        assert loop_period(list(tokens)) == found[-1], tokens
    assert {0, *range(1, 10)} == set(found)


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
