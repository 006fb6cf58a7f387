"""study.html: one self-contained page with every experiment, the printed numbers beside ours; opens offline."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.config.load import to_yaml
from pipelines.study.config import StudyConfig
from pipelines.study.demo_points import TASKS
from pipelines.study.findings import GUARANTEE, NAMES, closest, how
from pipelines.study.pieces import Row
from pipelines.study.plots import COLORS, Interval, Series, chart, interval_chart, legend

if TYPE_CHECKING:
    from pipelines.run.outcome import Outcome
    from pipelines.study.pieces import Conclusion

METHODS = {"divprune": "DivPrune", "otprune": "OTPrune"}


def render_study(config: StudyConfig, conclusions: "Mapping[str, Conclusion]", outcome: "Outcome") -> str:
    """The page; experiments without a conclusion are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("study.html.jinja").render(
        outcome=outcome,
        config_yaml=own_settings(config),
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
    """The study's part of the configuration as YAML."""
    from omegaconf import OmegaConf

    from pipelines.study.config import OWN

    whole = OmegaConf.create(to_yaml(config))
    return OmegaConf.to_yaml(OmegaConf.masked_copy(whole, [*OWN, "model"]))  # type: ignore[arg-type]


def table2_figures(tables: Mapping[str, list[Row]]) -> dict[str, Markup]:
    """Win rates and ratios with their spread, and what is printed."""
    rows = [row for row in tables["table2"] if row["centered"]]
    figures = {}
    for kind, printed, label in (
        ("win", "printed_win", "subsets beaten, %"),
        ("q_ratio", "printed_ratio", "q relative to the best subset, %"),
    ):
        intervals = [
            Interval(
                f"{METHODS[row['method']]} ({row['num_tokens']}, {row['width']}, {row['keep']})",
                row[kind],
                row[kind] - row[f"{kind}_sd"],
                row[kind] + row[f"{kind}_sd"],
                row[printed],
                COLORS[0] if row["method"] == "otprune" else COLORS[1],
            )
            for row in rows
        ]
        lowest = min([i.low for i in intervals] + [row[printed] for row in rows])
        figures[kind] = interval_chart(intervals, x_label=label, x_range=(max(0, 10 * math.floor(lowest / 10)), 101))
    return figures


def greedy_figures(tables: Mapping[str, list[Row]]) -> dict[str, Markup]:
    """Every search's ratio, by setting."""
    lines = tables["greedy"]
    intervals = [
        Interval(
            f"({row['num_tokens']}, {row['width']}, {row['keep']}), gamma {row['gamma']:g}",
            row["mean_ratio"],
            row["worst_ratio"],
            1.0,
        )
        for row in lines
    ]
    label = "log det of the greedy set / of the best of all subsets"
    return {"ratios": interval_chart(intervals, x_label=label, x_range=(0.6, 1.005), zero=GUARANTEE)}


def gamma_figures(tables: Mapping[str, list[Row]]) -> dict[str, Markup]:
    """Overlap against width, and accuracy against gamma, a line for each scale."""
    widths, accuracy = tables["gamma_widths"], tables["gamma_accuracy"]
    scales = list(dict.fromkeys(row["scale"] for row in widths))
    colors = dict(zip(scales, COLORS, strict=False))
    ticks = sorted({row["width"] for row in widths})

    def over_widths(column: str, scale: str) -> list[tuple[float, float]]:
        mine = {w: [r[column] for r in widths if (r["width"], r["scale"]) == (w, scale)] for w in ticks}
        return [(width, 100 * sum(values) / len(values)) for width, values in mine.items()]

    def plot(column: str, y_label: str) -> Markup:
        series = [Series(scale, over_widths(column, scale), colors[scale]) for scale in scales]
        return chart(series, x_label="feature width D", y_label=y_label, x_ticks=ticks, log_x=True, width=380)

    points = [
        Series(scale, sorted((r["gamma"], r["qa"]) for r in accuracy if r["scale"] == scale), colors[scale])
        for scale in scales
    ]
    gammas = sorted({row["gamma"] for row in accuracy})
    return {
        "overlap": plot("overlap", "same tokens as the reference, %"),
        "largest": plot("largest", "kept that are the largest, %"),
        "accuracy": chart(points, x_label="gamma", y_label="questions right", x_ticks=gammas, log_x=True, width=380),
        "legend": legend(points),
    }


def distance_figures(tables: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Accuracy against each distance at every retention, and rho with its intervals."""
    points, correlations = tables["distance_points"], tables["distance_correlations"]
    names = list(dict.fromkeys(row["point"] for row in points))
    colors = dict(zip(names, COLORS, strict=False))
    retentions = sorted({row["retention"] for row in points})
    distances = [name for name in NAMES if name in points[0]]

    def plot(distance: str, retention: float) -> Markup:
        here = [row for row in points if row["retention"] == retention]
        series = [
            Series(row["point"], [(row[distance], row["qa"])], colors[row["point"]], joined=False) for row in here
        ]
        title = f"{100 * retention:g} % kept"
        return chart(series, x_label=NAMES[distance], y_label="questions right", title=title, width=300, height=230)

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
    label = "Spearman's rho of closeness and questions right"
    return {
        "scatter": {distance: [plot(distance, retention) for retention in retentions] for distance in distances},
        "legend": legend([Series(name, (), colors[name]) for name in names]),
        "rho": interval_chart(rho, x_label=label, x_range=(-1, 1), zero=0, width=720),
    }


FIGURES: dict[str, Callable[[Mapping[str, list[Row]]], dict[str, Any]]] = {
    "table2": table2_figures,
    "greedy": greedy_figures,
    "gamma": gamma_figures,
    "distance": distance_figures,
}
