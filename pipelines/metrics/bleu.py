"""BLEU-4 of a corpus of captions (Papineni et al. 2002), as pycocoevalcap's `Bleu` computes it with "closest" lengths.

    BLEU-4 = BP * (p1 p2 p3 p4)^(1/4),   p_n = clipped n-gram matches / candidate n-grams,   BP = exp(1 - r/c) if c < r

c is the length of the candidate, r the length of the reference whose length is closest to c, the shorter one on a tie.
The counts of all images are added before the formula is applied. `bleu4_counts` and `bleu4` are separate, so that a
resample of images only adds other counts.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_N = 4
NUM_COUNTS = 2 * MAX_N + 2
_TINY, _SMALL = 1e-15, 1e-9  # guards of the published code: a corpus without a match scores 0


def bleu4_counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """The counts of one image, float64 [10]: matches (n = 1..4), n-grams (n = 1..4), candidate and reference length."""
    counts = np.zeros(NUM_COUNTS)
    for n in range(1, MAX_N + 1):
        clip: Counter[tuple[str, ...]] = Counter()  # n-gram -> its largest count in any one reference
        for reference in references:
            clip |= _ngrams(reference, n)
        grams = _ngrams(candidate, n)
        counts[n - 1] = (grams & clip).total()
        counts[MAX_N + n - 1] = grams.total()
    length = len(candidate)
    counts[-2] = length
    counts[-1] = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return counts


def bleu4(counts: np.ndarray) -> np.ndarray:
    """BLEU-4 [...] in [0, 1] from summed counts [..., 10]."""
    matches, grams = counts[..., :MAX_N], counts[..., MAX_N : 2 * MAX_N]
    precision = np.prod((matches + _TINY) / (grams + _SMALL), axis=-1) ** (1 / MAX_N)
    ratio = (counts[..., -2] + _TINY) / (counts[..., -1] + _SMALL)
    return precision * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
