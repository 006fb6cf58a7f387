"""ROUGE-L of one caption against its references (Lin 2004), as pycocoevalcap's `Rouge` computes it.

    P = max over references of LCS / candidate length,   R = max over references of LCS / reference length
    ROUGE-L = (1 + b^2) P R / (R + b^2 P),   b = 1.2

P and R may come from different references. A corpus scores the mean of its images.
"""

from collections.abc import Sequence

BETA = 1.2


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L in [0, 1] from tokens; 0 if nothing is shared, which an empty caption cannot."""
    lengths = [(common_length(candidate, reference), len(reference)) for reference in references]
    precision = max(common for common, _ in lengths) / max(1, len(candidate))
    recall = max(common / max(1, length) for common, length in lengths)
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the dynamic programme per machine word (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    ones = (1 << len(a)) - 1
    row = ones  # bit i is 0 where the table grows between i and i + 1
    for token in b:
        matched = row & where.get(token, 0)
        row = ((row + matched) | (row - matched)) & ones
    return len(a) - row.bit_count()
