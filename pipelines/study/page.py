"""study.html: one self-contained page of every experiment, which shows the printed numbers beside the computed ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipelines.config.load import to_yaml
from pipelines.output.fingerprint import fingerprint
from pipelines.report.environment import render_page
from pipelines.report.plots import COLORS, Interval, Point, Series, intervals, legend, plot, styles_of
from pipelines.report.scale import Axis, axis_over
from pipelines.study.config import OWN, StudyConfig
from pipelines.study.demo_points import TASKS
from pipelines.study.findings import GUARANTEE, NAMES, closest, how
from pipelines.study.pieces import Row

if TYPE_CHECKING:
    from pipelines.run.outcome import Outcome
    from pipelines.study.pieces import Conclusion

Tables = Mapping[str, list[Row]]

METHODS = {"otprune": "OTPrune", "divprune": "DivPrune"}


def render_study(config: StudyConfig, conclusions: "Mapping[str, Conclusion]", outcome: "Outcome") -> str:
    """The page as HTML. An experiment without a conclusion is left out."""
    return render_page(
        "study/study.html.jinja",
        kind="study",
        fingerprint=fingerprint(config.dotted()),
        config_yaml=own_settings(config),
        machines=(f"{outcome.cluster}.",) if outcome.cluster else (),
        outcome=outcome,
        model=config.model.path,
        found={name: conclusion.findings for name, conclusion in conclusions.items()},
        tables={k: v for conclusion in conclusions.values() for k, v in conclusion.tables.items()},
        figures={name: FIGURES[name](conclusion.tables) for name, conclusion in conclusions.items() if name in FIGURES},
        names=NAMES,
        methods=METHODS,
        tasks=("qa", *TASKS, "caption"),
        how=how,
        closest=closest,
        guarantee=GUARANTEE,
    )


def own_settings(config: StudyConfig) -> str:
    """The study's own keys of the configuration, and `model`, as YAML."""
    from omegaconf import OmegaConf

    everything = OmegaConf.create(to_yaml(config))
    return OmegaConf.to_yaml(OmegaConf.masked_copy(everything, [*OWN, "model"]))  # type: ignore[arg-type]


def table2_figures(tables: Tables) -> dict[str, Markup]:
    """Win rates and ratios with their spread, beside the printed values."""
    rows = [row for row in tables["table2"] if row["centered"]]
    styles = styles_of(METHODS)

    def figure(kind: str, printed: str, label: str) -> Markup:
        bars = [
            Interval(
                f"{METHODS[row['method']]} ({row['num_tokens']}, {row['width']}, {row['keep']})",
                row[kind],
                row[kind] - row[f"{kind}_sd"],
                row[kind] + row[f"{kind}_sd"],
                row[printed],
                styles[row["method"]].color,
            )
            for row in rows
        ]
        lowest = min([bar.low for bar in bars] + [row[printed] for row in rows])
        return intervals(bars, Axis(label, max(0, 10 * math.floor(lowest / 10)), 101))

    return {
        "win": figure("win", "printed_win", "subsets beaten, %"),
        "q_ratio": figure("q_ratio", "printed_ratio", "q relative to the best subset, %"),
    }


def greedy_figures(tables: Tables) -> dict[str, Markup]:
    """The mean and the worst ratio of the searches in each setting."""
    bars = [
        Interval(
            f"({row['num_tokens']}, {row['width']}, {row['keep']}), gamma {row['gamma']:g}",
            row["mean_ratio"],
            row["worst_ratio"],
            1.0,
        )
        for row in tables["greedy"]
    ]
    axis = Axis("log det of the greedy set / of the best of all subsets", 0.6, 1.005)
    return {"ratios": intervals(bars, axis, level=GUARANTEE)}


def gamma_figures(tables: Tables) -> dict[str, Markup]:
    """Overlap over width, and accuracy over gamma, with one line for each scale."""
    by_width, accuracy = tables["gamma_widths"], tables["gamma_accuracy"]
    styles = styles_of(row["scale"] for row in by_width)
    widths = sorted({row["width"] for row in by_width})

    def over_widths(column: str, scale: str) -> list[tuple[float, float]]:
        values_of = {w: [r[column] for r in by_width if (r["width"], r["scale"]) == (w, scale)] for w in widths}
        return [(width, 100 * fmean(values)) for width, values in values_of.items()]

    def figure(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
        series = [Series(scale, [Point(*xy) for xy in line], styles[scale]) for scale, line in lines.items()]
        xs, ys = zip(*(xy for line in lines.values() for xy in line), strict=True)
        return plot(series, axis_over(xs, x_label, log=True, ticks=xs), axis_over(ys, y_label))

    def by_gamma(scale: str) -> list[tuple[float, float]]:
        return sorted((row["gamma"], row["qa"]) for row in accuracy if row["scale"] == scale)

    def overlaps(column: str, y_label: str) -> Markup:
        return figure({scale: over_widths(column, scale) for scale in styles}, "feature width D", y_label)

    return {
        "overlap": overlaps("overlap", "same tokens as the reference, %"),
        "largest": overlaps("largest", "kept tokens among the largest, %"),
        "accuracy": figure({scale: by_gamma(scale) for scale in styles}, "gamma", "questions right"),
        "legend": legend(styles),
    }


def distance_figures(tables: Tables) -> dict[str, Any]:
    """Accuracy over each distance at every retention, and rho with its intervals."""
    points = tables["distance_points"]
    styles = styles_of(row["point"] for row in points)
    retentions = sorted({row["retention"] for row in points})
    distances = [name for name in NAMES if name in points[0]]

    def scatter(distance: str, retention: float) -> Markup:
        at_retention = [row for row in points if row["retention"] == retention]
        series = [
            Series(row["point"], [Point(row[distance], row["qa"])], styles[row["point"]], joined=False)
            for row in at_retention
        ]
        x = axis_over([row[distance] for row in at_retention], NAMES[distance])
        y = axis_over([row["qa"] for row in at_retention], "questions right")
        return plot(series, x, y, title=f"{100 * retention:g} % kept")

    return {
        "scatter": {distance: [scatter(distance, retention) for retention in retentions] for distance in distances},
        "legend": legend(styles, dots=True),
        "rho": _rho_figure(tables["distance_correlations"], distances),
    }


def _rho_figure(correlations: Sequence[Row], distances: Sequence[str]) -> Markup:
    """rho of all selectors by distance, with the interval over scenes and methods."""
    overall = [row for row in correlations if (row["methods"], row["task"]) == ("all", "qa")]
    rho = [
        Interval(
            f"{NAMES[row['distance']].replace(', each set at', ',')}, {row['reading']}",
            row["rho"],
            row["methods_low"],
            row["methods_high"],
            color=COLORS[distances.index(row["distance"])],
        )
        for row in overall
        if row["reading"] in ("mean", "pooled") and not math.isnan(row["rho"])
    ]
    axis = Axis("Spearman's rho of closeness and questions right", -1, 1)
    return intervals(rho, axis, level=0, width=760)


FIGURES: dict[str, Callable[[Tables], dict[str, Any]]] = {
    "table2": table2_figures,
    "greedy": greedy_figures,
    "gamma": gamma_figures,
    "distance": distance_figures,
}
