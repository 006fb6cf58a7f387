"""The two experiments with the demo model: the effect of gamma on its answers, and distance against accuracy."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from pipelines.metrics.bootstrap import percentile_interval, resampled_sums
from pipelines.study import findings
from pipelines.study.config import StudyConfig
from pipelines.study.correlation import accuracies, arrange, correlate
from pipelines.study.demo_points import BLIND, DISTANCES, FIGURE_2, POINTS, TASKS, Point, measure_scenes
from pipelines.study.gamma import compare_widths
from pipelines.study.pieces import Conclusion, Model, Piece, Row

UNPRUNED = {"label": "all tokens", "method": "none"}


def plan_gamma(config: StudyConfig, model: Model) -> list[Piece]:
    """One piece for each synthetic image, and the demo model's answers at each gamma and scale."""
    settings = config.gamma
    arguments = {
        "tokens": settings.tokens,
        "kept": settings.kept,
        "widths": list(settings.widths),
        "gammas": list(settings.gammas),
        "scales": list(settings.scales),
    }
    widths = [
        Piece("gamma", f"widths-seed{seed:03d}", compare_widths, {**arguments, "seed": seed})
        for seed in range(settings.seeds)
    ]
    points = [
        {"label": f"{scale} {gamma:g}", "method": "otprune", "gamma": gamma, "gamma_scale": scale}
        for scale in settings.scales
        for gamma in settings.gammas
    ]
    return widths + _scene_pieces("gamma", config, model, settings.retention, points, [])


def conclude_gamma(rows: list[Row], config: StudyConfig) -> Conclusion:
    """Means over images at each width, scale and gamma, and the accuracy at each scale and gamma."""
    groups: dict[tuple[int, str, float], list[Row]] = {}
    for row in rows:
        if "width" in row:
            groups.setdefault((row["width"], row["scale"], row["gamma"]), []).append(row)
    widths = [
        {
            "width": width,
            "scale": scale,
            "gamma": gamma,
            **{name: fmean(row[name] for row in group) for name in ("overlap", "largest", "objective")},
        }
        for (width, scale, gamma), group in groups.items()
    ]
    accuracy = [
        {**row, "scale": row["point"].split()[0], "gamma": float(row["point"].split()[1])}
        for row in _accuracy_table([row for row in rows if "point" in row], config, [])
    ]
    metrics = {f"qa/{row['scale']}/{row['gamma']:g}": row["qa"] for row in accuracy}
    sentences = findings.of_gamma(widths, accuracy, config.gamma.widths[-1])
    return Conclusion({"gamma_widths": widths, "gamma_accuracy": accuracy}, metrics, sentences)


def distance_points(config: StudyConfig) -> list[str]:
    """Names of the selectors to compare."""
    return list(config.distance.methods) or list(POINTS)


def distance_names(config: StudyConfig) -> list[str]:
    """Names of the distances to measure."""
    return [name for name in DISTANCES if name != "exact" or config.distance.exact]


def plan_distance(config: StudyConfig, model: Model) -> list[Piece]:
    """The unpruned model's answers, and every selector's distances and answers at every retention."""
    points = [{"label": name, **POINTS[name]} for name in distance_points(config)]
    pieces = _scene_pieces("distance", config, model, 1.0, [UNPRUNED], [])
    for retention in config.distance.retentions:
        pieces += _scene_pieces("distance", config, model, retention, points, distance_names(config))
    return pieces


def conclude_distance(rows: list[Row], config: StudyConfig) -> Conclusion:
    """Means of every selector, and rho over all selectors, the paper's five, and those that look at the tokens."""
    names, points = distance_names(config), distance_points(config)
    pruned = [row for row in rows if row["point"] != UNPRUNED["label"]]
    columns = [*names, *(f"{kind}_{task}" for task in (*TASKS, "caption") for kind in ("right", "asked"))]
    subsets = {
        "all": points,
        "figure 2": [name for name in FIGURE_2 if name in points],
        "looking": [name for name in points if name not in BLIND],
    }
    correlations = [
        {"methods": subset, **row}
        for subset, chosen in subsets.items()
        if len(chosen) > 2
        for row in correlate(arrange(pruned, chosen, columns), names, TASKS, config.resamples)
    ]
    table = _accuracy_table(pruned, config, names)
    unpruned = _accuracy_table([row for row in rows if row["point"] == UNPRUNED["label"]], config, [])
    metrics = {
        f"rho/{row['distance']}/{row['reading']}": row["rho"]
        for row in correlations
        if row["methods"] == "all" and row["task"] == "qa" and not math.isnan(row["rho"])
    }
    tables = {"distance_points": table, "distance_correlations": correlations, "unpruned": unpruned}
    return Conclusion(tables, metrics, findings.of_distance(table, correlations, unpruned))


def _scene_pieces(
    experiment: str,
    config: StudyConfig,
    model: Model,
    retention: float,
    points: Sequence[Point],
    distances: Sequence[str],
) -> list[Piece]:
    """Pieces of a few scenes each, which measure all points at one retention."""
    scenes, step = config.distance.scenes, config.piece_scenes
    arguments = {"retention": retention, "points": list(points), "distances": list(distances), "weights": model.weights}
    return [
        Piece(
            experiment,
            f"keep{100 * retention:g}-scene{start:04d}",
            measure_scenes,
            {**arguments, "start": start, "stop": min(start + step, scenes)},
            {"model": model.folder},  # `where`: the digest of the weights decides, not their folder
        )
        for start in range(0, scenes, step)
    ]


def _accuracy_table(rows: list[Row], config: StudyConfig, distances: Sequence[str]) -> list[Row]:
    """One row for each point and retention: mean distances, accuracies, and the interval of `qa` over scenes."""
    points = list(dict.fromkeys(row["point"] for row in rows))
    columns = [*distances, *(f"{kind}_{task}" for task in (*TASKS, "caption") for kind in ("right", "asked"))]
    measured = arrange(rows, points, columns)
    kept = {row["retention"]: row["kept"] for row in rows}
    flat = measured.values.reshape(len(measured.values), -1)
    drawn = resampled_sums(flat, config.resamples).reshape(-1, *measured.values.shape[1:])
    scores = accuracies(measured.values.sum(axis=0), columns, TASKS)
    resampled = accuracies(drawn, columns, TASKS)["qa"]
    table = []
    for r, retention in enumerate(measured.retentions):
        for p, point in enumerate(points):
            low, high = percentile_interval(resampled[:, r, p])
            means = np.mean(measured.values[:, r, p], axis=0)
            table.append(
                {
                    "point": point,
                    "retention": retention,
                    "kept": kept[retention],
                    "scenes": len(measured.values),
                    "qa_low": low,
                    "qa_high": high,
                    **{name: float(score[r, p]) for name, score in scores.items()},
                    **{name: float(means[columns.index(name)]) for name in distances},
                }
            )
    return table
