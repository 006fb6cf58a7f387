"""ROUGE-L of one caption against its references (Lin 2004), as pycocoevalcap's `Rouge` computes it.

    P = max over references of LCS / candidate length,   R = max over references of LCS / reference length
    ROUGE-L = (1 + b^2) P R / (R + b^2 P),   b = 1.2

P and R may come from different references. The score of a corpus is the mean over its images.
"""

from collections.abc import Sequence

BETA = 1.2


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L in [0, 1] from tokens; 0 if the caption shares no token with a reference, as an empty caption."""
    lengths = [(common_length(candidate, reference), len(reference)) for reference in references]
    precision = max(common for common, _ in lengths) / max(1, len(candidate))
    recall = max(common / max(1, length) for common, length in lengths)
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the bit-parallel dynamic programme of Hyyro (2004).

    One integer holds a whole row of the table, so a token of b costs a few integer operations, not len(a) steps.
    """
    positions: dict[str, int] = {}  # token -> bits of its positions in a
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    ones = (1 << len(a)) - 1
    row = ones  # bit i is 0 if the table's row grows from column i to column i + 1
    for token in b:
        matched = row & positions.get(token, 0)
        row = ((row + matched) | (row - matched)) & ones
    return len(a) - row.bit_count()
