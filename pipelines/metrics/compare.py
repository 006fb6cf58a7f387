"""Tests whether the difference of two runs on the same questions is more than chance.

The module needs scipy, so callers import it inside the function that uses it.
"""

import numpy as np
from scipy.stats import binomtest, wilcoxon


def wilcoxon_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test on paired scores [G]; 1 if no pair differs.

    Pairs without a difference are left out (Wilcoxon's own rule). The test is for scores with more than two values,
    such as the CIDEr of an image; `mcnemar_p` is for right or wrong answers.

    Raises:
        ValueError: if the two differ in length, or are empty.
    """
    difference = _paired_difference(ours, theirs)
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    return float(np.asarray(wilcoxon(difference))[1])  # (statistic, p)


def mcnemar_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sided p of the exact McNemar test on paired right/wrong answers [G]; 1 if no pair differs.

    Under the null hypothesis each run wins half of the pairs that differ, so the test is a binomial test with
    probability 1/2.

    Raises:
        ValueError: if the two differ in length, are empty, or hold values other than 0 and 1.
    """
    difference = _paired_difference(ours, theirs)
    if not np.isin(ours, (0, 1)).all() or not np.isin(theirs, (0, 1)).all():
        raise ValueError("ours and theirs must be 0 or 1 throughout, got other values")
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _paired_difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"ours and theirs must be of one length, at least 1, got {len(ours)} and {len(theirs)}")
    return np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
