"""Tests whether a smaller distance means a higher accuracy: Spearman's rho over methods, with bootstrap intervals.

rho correlates closeness (the negative distance, or the objective of Eq. 4 itself) with accuracy; the paper claims
rho > 0. Closeness and accuracy are means over scenes. "Over methods" has three readings:

    <retention>   rho of the points at one retention, which is the subject of the claim
    mean          the mean of these rho over the retentions
    pooled        rho of all points of all retentions in one ranking. Keeping more tokens is closer and better in any
                  case, so this rho is positive even for a distance that says nothing about methods

There are two intervals. One resamples scenes: the same methods on other images. The other resamples scenes and methods:
other methods of this kind. The second is wide, because there are few methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from pipelines.metrics.bootstrap import percentile_interval, resampled_sums
from pipelines.study.pieces import Row

MAXIMISED = ("trace",)  # larger is closer


@dataclass(frozen=True)
class Measured:
    """The values of every scene, additive over scenes: `values` is float64 [scenes, retentions, points, columns]."""

    retentions: tuple[float, ...]
    points: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


def arrange(rows: Sequence[Row], points: Sequence[str], columns: Sequence[str]) -> Measured:
    """The rows of `demo_points.measure_scenes` as one array.

    Every scene must have every point at every retention.
    """
    retentions = tuple(sorted({row["retention"] for row in rows if row["point"] in points}))
    scenes = sorted({row["scene"] for row in rows})
    index_of = {scene: i for i, scene in enumerate(scenes)}
    values = np.full((len(scenes), len(retentions), len(points), len(columns)), np.nan)
    for row in rows:
        if row["point"] in points:
            cell = index_of[row["scene"]], retentions.index(row["retention"]), points.index(row["point"])
            values[cell] = [row[column] for column in columns]
    assert not np.isnan(values).any(), "a scene lacks a point"
    return Measured(retentions, tuple(points), tuple(columns), values)


def accuracies(sums: np.ndarray, columns: Sequence[str], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Share of right answers [...] of each task and of captions, from sums [..., C]; `qa` is the mean of the tasks.

    If no scene of a resample asks a task, the mean of this resample leaves the task out.
    """
    column = {name: sums[..., i] for i, name in enumerate(columns)}
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {task: column[f"right_{task}"] / column[f"asked_{task}"] for task in (*tasks, "caption")}
    return {"qa": np.nanmean([shares[task] for task in tasks], axis=0), **shares}


def correlate(
    measured: Measured, distances: Sequence[str], tasks: Sequence[str], resamples: int, seed: int = 0
) -> list[Row]:
    """One row for each distance, task and reading: rho, its 95 % interval over scenes, and over scenes and methods."""
    num_scenes, num_points = len(measured.values), len(measured.points)
    flat = measured.values.reshape(num_scenes, -1)
    shape = measured.values.shape[1:]
    sums = flat.sum(axis=0).reshape(1, *shape)
    drawn = resampled_sums(flat, resamples, seed).reshape(-1, *shape)
    # A resample draws its methods with replacement, the same methods at every retention.
    chosen = np.random.default_rng(seed).integers(num_points, size=(len(drawn), 1, num_points, 1))
    mixed = np.take_along_axis(drawn, np.broadcast_to(chosen, (len(drawn), shape[0], num_points, 1)), axis=2)
    rho, by_scenes, by_both = (_readings(part, measured, distances, tasks) for part in (sums, drawn, mixed))
    rows = []
    for (distance, task, reading), value in rho.items():
        low, high = _interval(by_scenes[distance, task, reading])
        wide_low, wide_high = _interval(by_both[distance, task, reading])
        rows.append(
            {
                "distance": distance,
                "task": task,
                "reading": reading,
                "points": num_points * (shape[0] if reading == "pooled" else 1),
                "rho": float(value[0]),
                "low": low,
                "high": high,
                "methods_low": wide_low,
                "methods_high": wide_high,
            }
        )
    return rows


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho [...] along the last axis. Ties share their mean rank. NaN if one side is constant."""
    x, y = (rankdata(side, axis=-1) for side in np.broadcast_arrays(x, y))
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def _readings(
    sums: np.ndarray, measured: Measured, distances: Sequence[str], tasks: Sequence[str]
) -> dict[tuple[str, str, str], np.ndarray]:
    """rho [B] by distance, task and reading, from sums [B, retentions, points, columns]."""
    rho = {}
    accuracy = accuracies(sums, measured.columns, tasks)
    for distance in distances:
        close = sums[..., measured.columns.index(distance)] * (1 if distance in MAXIMISED else -1)
        for task, score in accuracy.items():
            by_retention = spearman(close, score)
            rho |= {(distance, task, f"{r:g}"): by_retention[:, i] for i, r in enumerate(measured.retentions)}
            rho[distance, task, "mean"] = by_retention.mean(axis=-1)
            rho[distance, task, "pooled"] = spearman(close.reshape(len(close), -1), score.reshape(len(score), -1))
    return rho


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the resamples that have a rho; NaN if none has."""
    values = values[~np.isnan(values)]
    return percentile_interval(values) if len(values) else (float("nan"), float("nan"))
