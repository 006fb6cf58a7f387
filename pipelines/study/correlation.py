"""Does a smaller distance mean a higher accuracy? Spearman's rho over methods, with bootstrap intervals.

rho correlates closeness (the negative distance, or the objective of Eq. 4 itself) with accuracy: the paper's claim is
rho > 0. Both are means over scenes. Three readings of "over methods":

    <retention>   the points at one retention: what the claim is about
    mean          the mean of those over the retentions
    pooled        all points of all retentions in one ranking; keeping more is closer and better in any case, so this is
                  positive even for a distance that says nothing about methods

Two intervals: over scenes (the same methods, other images), and over scenes and methods (other methods of this kind),
which is wide because there are few methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from pipelines.metrics.bootstrap import percentile_interval, resampled_sums
from pipelines.study.pieces import Row

MAXIMISED = ("trace",)


@dataclass(frozen=True)
class Measured:
    """Sums over scenes are linear in `values` [scenes, retentions, points, columns]."""

    retentions: tuple[float, ...]
    points: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


def arrange(rows: Sequence[Row], points: Sequence[str], columns: Sequence[str]) -> Measured:
    """The rows of `demo_points.measure_scenes` as one array; every scene must have every point at every retention."""
    retentions = tuple(sorted({row["retention"] for row in rows if row["point"] in points}))
    scenes = sorted({row["scene"] for row in rows})
    place = {scene: i for i, scene in enumerate(scenes)}
    values = np.full((len(scenes), len(retentions), len(points), len(columns)), np.nan)
    for row in rows:
        if row["point"] in points:
            where = place[row["scene"]], retentions.index(row["retention"]), points.index(row["point"])
            values[where] = [row[column] for column in columns]
    assert not np.isnan(values).any(), "a scene lacks a point"
    return Measured(retentions, tuple(points), tuple(columns), values)


def accuracies(sums: np.ndarray, columns: Sequence[str], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Share of right answers [...] of each task and of captions, and `qa`, the mean of the tasks, from sums [..., C].

    A task that no scene of a resample asked is left out of its mean.
    """
    column = {name: sums[..., i] for i, name in enumerate(columns)}
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {task: column[f"right_{task}"] / column[f"asked_{task}"] for task in (*tasks, "caption")}
    return {"qa": np.nanmean([shares[task] for task in tasks], axis=0), **shares}


def correlate(
    measured: Measured, distances: Sequence[str], tasks: Sequence[str], resamples: int, seed: int = 0
) -> list[Row]:
    """One row for each distance, task and reading: rho, and both intervals of 95 %."""
    num_scenes, num_points = len(measured.values), len(measured.points)
    flat = measured.values.reshape(num_scenes, -1)
    shape = measured.values.shape[1:]
    sums = flat.sum(axis=0).reshape(1, *shape)
    drawn = resampled_sums(flat, resamples, seed).reshape(-1, *shape)
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
    """Spearman's rho [...] along the last axis, ties sharing their mean rank; nan where one side is constant."""
    x, y = (rankdata(side, axis=-1) for side in np.broadcast_arrays(x, y))
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def _readings(
    sums: np.ndarray, measured: Measured, distances: Sequence[str], tasks: Sequence[str]
) -> dict[tuple[str, str, str], np.ndarray]:
    """rho [B] by distance, task and reading, of sums [B, retentions, points, columns]."""
    found = {}
    accuracy = accuracies(sums, measured.columns, tasks)
    for distance in distances:
        close = sums[..., measured.columns.index(distance)] * (1 if distance in MAXIMISED else -1)
        for task, score in accuracy.items():
            each = spearman(close, score)
            found |= {(distance, task, f"{r:g}"): each[:, i] for i, r in enumerate(measured.retentions)}
            found[distance, task, "mean"] = each.mean(axis=-1)
            found[distance, task, "pooled"] = spearman(close.reshape(len(close), -1), score.reshape(len(score), -1))
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    return percentile_interval(values) if len(values) else (float("nan"), float("nan"))
