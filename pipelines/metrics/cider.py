"""CIDEr-D of a corpus of captions: Vedantam et al. 2015, section 4, as pycocoevalcap's `Cider` computes it.

For n-grams of n = 1..4, with tf the count in a caption and df the number of images with the n-gram in a reference:

    g(s)      = tf * (ln N - ln max(1, df))                               over N images
    sim_n     = sum_w min(g(c)_w, g(r)_w) g(r)_w / (|g(c)| |g(r)|) * exp(-(Lc - Lr)^2 / (2 * 6^2))
    CIDEr-D   = 10 * mean over n of the mean over references; a corpus scores the mean of its images

The document frequencies come from the references of the scored images. So an image scores differently in a subset than
in the whole corpus, and one image alone scores 0. `L` counts bigrams, as the published code does.

The code passes over the references twice, so that memory holds the document frequencies and the counts of one image.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines.metrics.pairs import Key, check_pairs
from pipelines.metrics.ptb import tokenize

Tokens = Sequence[str]
Vector = dict[tuple[str, ...], float]

MAX_N = 4
SIGMA = 6.0


def cider_d(candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> float:
    """CIDEr-D of a corpus on the raw scale (0 to 10; about 1.1 for LLaVA-1.5 on COCO). Tokenises both sides.

    Raises:
        ValueError: if the ids of the two differ, there are none, an image has no reference, or its candidate is not
            one string.
    """
    check_pairs(candidates, references)
    if wrong := [key for key, text in candidates.items() if not isinstance(text, str)]:
        raise ValueError(f"candidate of {wrong[0]!r} must be one string, got {type(candidates[wrong[0]]).__name__}")
    scores = cider_d_scores(
        {key: tokenize(text) for key, text in candidates.items()},
        {key: [tokenize(text) for text in texts] for key, texts in references.items()},
    )
    return math.fsum(scores.values()) / len(scores)


def cider_d_scores(candidates: Mapping[Key, Tokens], references: Mapping[Key, Sequence[Tokens]]) -> dict[Key, float]:
    """CIDEr-D of every image, from tokens; the corpus score is their mean.

    Raises:
        ValueError: as `cider_d`.
    """
    check_pairs(candidates, references)
    df: Counter[tuple[str, ...]] = Counter()
    for texts in references.values():
        df.update({gram for tokens in texts for counts in _ngram_counts(tokens) for gram in counts})
    log_images = math.log(len(candidates))
    idf = {gram: log_images - math.log(count) for gram, count in df.items()}
    return {
        key: _image_score(tokens, references[key], idf, log_images)  # ln N: the idf of an n-gram in no reference
        for key, tokens in candidates.items()
    }


def _image_score(candidate: Tokens, references: Sequence[Tokens], idf: Vector, unseen: float) -> float:
    """CIDEr-D of one image. `unseen` is the idf of an n-gram that no reference holds."""
    vectors = [_weigh(counts, idf, unseen) for counts in _ngram_counts(candidate)]
    norms = [_norm(vector) for vector in vectors]
    total = 0.0
    for reference in references:
        length_gap = _num_bigrams(candidate) - _num_bigrams(reference)
        penalty = math.exp(-(length_gap**2) / (2 * SIGMA**2))
        for vector, norm, counts in zip(vectors, norms, _ngram_counts(reference), strict=True):
            other = _weigh(counts, idf, unseen)
            dot = sum(min(weight, other[gram]) * other[gram] for gram, weight in vector.items() if gram in other)
            scale = norm * _norm(other)
            total += penalty * (dot / scale if scale else dot)
    return 10.0 * total / (MAX_N * len(references))


def _ngram_counts(tokens: Tokens) -> list[Counter[tuple[str, ...]]]:
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, MAX_N + 1)]


def _weigh(counts: Counter[tuple[str, ...]], idf: Vector, unseen: float) -> Vector:
    return {gram: count * idf.get(gram, unseen) for gram, count in counts.items()}


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(weight * weight for weight in vector.values()))


def _num_bigrams(tokens: Tokens) -> int:
    return max(0, len(tokens) - 1)
