"""CIDEr-D, BLEU-4 and ROUGE-L against the published code on the same tokens, and their edge cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipelines.metrics import cider_d, cider_d_scores
from pipelines.metrics.bleu import bleu4, bleu4_counts
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.rouge import common_length, rouge_l
from tests.metrics.test_ptb import java_tokens

SAMPLE = {
    int(key): texts
    for key, texts in json.loads((Path(__file__).parents[1] / "data" / "captions_sample.json").read_text()).items()
}
CANDIDATES = {key: texts[0] for key, texts in SAMPLE.items()}
REFERENCES = {key: texts[1:] for key, texts in SAMPLE.items()}
TOKENS = {key: tokenize(text) for key, text in CANDIDATES.items()}
REFERENCE_TOKENS = {key: [tokenize(text) for text in texts] for key, texts in REFERENCES.items()}


def joined() -> tuple[dict, dict]:
    """(references, candidates) as the published scorers take them."""
    references = {key: [" ".join(tokens) for tokens in texts] for key, texts in REFERENCE_TOKENS.items()}
    return references, {key: [" ".join(tokens)] for key, tokens in TOKENS.items()}


def test_cider_of_every_image_is_the_published_one():
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    mean, scores = cider.Cider().compute_score(*joined())
    ours = cider_d_scores(TOKENS, REFERENCE_TOKENS)
    np.testing.assert_allclose(list(ours.values()), scores, rtol=0, atol=1e-9)  # same formula, another order of sums
    assert cider_d(CANDIDATES, REFERENCES) == pytest.approx(mean, abs=1e-9)


def test_cider_end_to_end_is_within_a_thousandth_of_the_java_pipeline(tmp_path: Path):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    candidates = dict(zip(CANDIDATES, java_tokens(list(CANDIDATES.values()), tmp_path), strict=True))
    flat = iter(java_tokens([text for texts in REFERENCES.values() for text in texts], tmp_path))
    references = {key: [" ".join(next(flat)) for _ in texts] for key, texts in REFERENCES.items()}
    theirs, _ = cider.Cider().compute_score(references, {key: [" ".join(tokens)] for key, tokens in candidates.items()})
    assert cider_d(CANDIDATES, REFERENCES) == pytest.approx(theirs, abs=0.001)  # 0.1 points at x100


def test_cider_of_a_caption_that_is_its_only_reference_is_ten():
    captions = {1: "a red bus on a street", 2: "two dogs play with a ball", 3: "one cat sleeps here now"}
    assert cider_d(captions, {key: [text] for key, text in captions.items()}) == pytest.approx(10.0)


def test_cider_of_one_image_is_zero_because_every_ngram_is_in_every_document():
    assert cider_d({1: "a red bus"}, {1: ["a red bus"]}) == 0.0


def test_cider_document_frequencies_come_from_the_scored_images():
    few = dict(list(CANDIDATES.items())[:20])
    all_scores = cider_d_scores(TOKENS, REFERENCE_TOKENS)
    inside = np.mean([all_scores[key] for key in few])
    assert abs(cider_d(few, {key: REFERENCES[key] for key in few}) - inside) > 0.01


def test_cider_punishes_length_by_a_gaussian_of_the_bigram_count():
    """Image 1 says its reference with the last word `repeats` times; every n-gram there has the idf ln 2."""

    def by_hand(repeats: int) -> float:
        extra = repeats - 1
        cosines = [
            3 / (math.sqrt(2 + repeats**2) * math.sqrt(3)),  # clipped at the reference's count
            2 / (math.sqrt(2 + extra**2) * math.sqrt(2)),
            1 / math.sqrt(1 + min(extra, 1) + max(0, extra - 1) ** 2),
        ]
        return 10 / 4 * math.exp(-(extra**2) / 72) * sum(cosines)

    references = {1: [["a", "red", "bus"]] * 2, 2: [["two", "dogs", "run", "fast"]]}
    for repeats in (1, 4):
        candidates = {1: ["a", "red", *["bus"] * repeats], 2: ["x"]}
        assert cider_d_scores(candidates, references)[1] == pytest.approx(by_hand(repeats))


def test_cider_of_an_empty_caption_is_zero():
    assert cider_d_scores({1: [], 2: ["dog"]}, {1: [["a", "bus"]], 2: [["a", "dog"]]})[1] == 0.0


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "at least one caption"),
        ({1: "a"}, {2: ["a"]}, "same ids"),
        ({1: "a", 2: "b"}, {1: ["a"]}, "1 without references"),
        ({1: "a"}, {1: []}, "at least one caption, got"),
        ({1: "a"}, {1: "a"}, "must be a list"),
        ({1: ["a", "b"]}, {1: ["a"]}, "must be one string, got list"),
    ],
)
def test_cider_names_what_is_wrong_with_its_input(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        cider_d(candidates, references)


def test_bleu_of_the_corpus_is_the_published_one():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    theirs, _ = bleu.Bleu(4).compute_score(*joined(), verbose=0)
    counts = sum(bleu4_counts(TOKENS[key], REFERENCE_TOKENS[key]) for key in TOKENS)
    assert bleu4(counts) == pytest.approx(theirs[3], abs=1e-12)


def test_bleu_takes_the_closest_reference_length_and_the_shorter_one_on_a_tie():
    counts = bleu4_counts(["a", "b", "c", "d"], [["a", "b"], ["a", "b", "c", "d", "e", "f"]])
    assert counts[-1] == 2


def test_bleu_clips_matches_at_the_most_any_reference_has():
    references = [text.split() for text in ("the cat is on the mat", "there is a cat on the mat")]
    counts = bleu4_counts(["the"] * 7, references)
    assert counts[0] == 2
    assert counts[4] == 7


def test_bleu_of_nothing_and_of_perfection():
    references = [["a", "b", "c", "d", "e"]]
    assert bleu4(bleu4_counts([], references)) == 0.0
    assert bleu4(bleu4_counts(references[0], references)) == pytest.approx(1.0, abs=1e-8)


def test_rouge_is_the_published_one():
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    _, scores = rouge.Rouge().compute_score(*joined())
    ours = [rouge_l(TOKENS[key], REFERENCE_TOKENS[key]) for key in TOKENS]
    np.testing.assert_allclose(ours, scores, rtol=0, atol=1e-12)


def test_common_length_is_the_textbook_recursion():
    def textbook(a, b):
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
        return table[-1, -1]

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ([str(token) for token in rng.integers(4, size=rng.integers(0, 90))] for _ in range(2))
        assert common_length(a, b) == textbook(a, b)


def test_rouge_without_anything_shared_is_zero():
    assert rouge_l([], [["a"]]) == 0.0
    assert rouge_l(["a"], [["b"], []]) == 0.0
