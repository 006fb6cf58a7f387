"""Confidence intervals by resampling scoring groups with replacement (percentile bootstrap, Efron 1979).

A metric is a function of sums over groups: mean accuracy of (right, asked), F1 of its four counts, MME of sums and
counts per category. So one resample is one weighted sum of the groups' statistics, and many resamples are one matrix
product. A group is scored as a whole: an image of MME, a question of MMBench with its copies.

Departures:
- CIDEr's document frequencies stay those of the whole run; only the image scores are resampled.
"""

from collections.abc import Callable, Iterator

import numpy as np

Combine = Callable[[np.ndarray], dict[str, np.ndarray]]  # sums [..., S] -> metric [...]

RESAMPLES = 1000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22  # bounds the memory of one block of resamples: 32 MiB of indices


def resampled_sums(statistics: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums [R, S] over R resamples of G groups with statistics [G, S]. The same seed, G and R draw the same groups.

    Raises:
        ValueError: if statistics is not two-dimensional with at least one group, or resamples is below 1.
    """
    if statistics.ndim != 2 or not len(statistics):
        raise ValueError(f"statistics must have the shape [groups, statistics], groups >= 1, got {statistics.shape}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    return np.concatenate([weights @ statistics for weights in _weights(len(statistics), resamples, seed)])


def bootstrap(
    statistics: np.ndarray, combine: Combine, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """(low, high) of every metric that `combine` computes from sums. Statistics are float [G, S], one row a group.

    Raises:
        ValueError: as `resampled_sums`, or if level is outside (0, 1).
    """
    metrics = combine(resampled_sums(statistics, resamples, seed))
    return {name: percentile_interval(values, level) for name, values in metrics.items()}


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The ends of the interval that holds the central share `level` of the values.

    Raises:
        ValueError: if level is outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weights(num_groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample draws each group, float64, in blocks of at most R rows and of G columns.

    Row r's draws are shifted by r * G, so that one `bincount` counts the draws of a whole block.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // num_groups)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(num_groups, size=(count, num_groups)) + num_groups * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * num_groups).reshape(count, num_groups).astype(np.float64)
