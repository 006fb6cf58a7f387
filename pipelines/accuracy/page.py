"""accuracy.html, the self-contained page of a grid's table, and the short form of the table for the terminal."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from otprune.methods import UNPRUNED
from otprune.methods.positional import BLIND
from pipelines.accuracy.config import AccuracyConfig
from pipelines.accuracy.table import Measured, Relative, find_point, relative_scores
from pipelines.benchmarks import Benchmark
from pipelines.config.load import to_yaml
from pipelines.output.fingerprint import fingerprint
from pipelines.report.environment import render_page
from pipelines.report.plots import Point, Series, Style, beside, legend, plot, styles_of
from pipelines.report.scale import axis_of_names, axis_over

Row = dict[str, Any]
Ends = tuple[float, float, float]  # a value and the ends of its interval
Points = dict[tuple[str, float], dict[str, Row]]  # (method, retention) -> benchmark -> row of the table
LEVEL_Q = 0.05  # the page marks differences with a smaller q


def render_accuracy(
    config: AccuracyConfig, table: pa.Table, measured: Sequence[Measured], benches: Sequence[Benchmark]
) -> str:
    """The page as HTML.

    Points over budget are in the table and in the section on distances. They are left out of "In short", of the charts
    over retention and of "Who beats whom".
    """
    points, names = by_point(table), [bench.name for bench in benches]
    methods = list(dict.fromkeys(method for method, _ in points if method != UNPRUNED))
    methods.sort(key=lambda m: config.grid.methods.index(m))
    retentions = sorted({retention for method, retention in points if method != UNPRUNED}, reverse=True)
    within = {point: rows for point, rows in points.items() if not rows[names[0]]["over_budget"]}
    comparable = {r: [m for m in methods if (m, r) in within] for r in retentions}  # retention -> methods within budget
    drawn = [m for m in methods if any(m in comparable[r] for r in retentions)]
    styles = styles_of(methods, quiet=[method.name for method in BLIND])
    drawn_styles = {method: styles[method] for method in drawn}  # no legend entry for a method without a line
    relative = relative_scores(measured, benches, config.resamples)
    return render_page(
        "accuracy/grid.html.jinja",
        kind="accuracy grid",
        fingerprint=fingerprint(config.dotted()),
        config_yaml=to_yaml(config),
        config=config,
        names=[(name, short_name(name)) for name in names],
        unpruned=points[UNPRUNED, 1.0],
        blocks=[(r, [points[m, r] for m in methods if (m, r) in points]) for r in retentions],
        legend=legend(drawn_styles),
        plots=_plots(within, names, drawn_styles, retentions),
        cost_legend=legend(styles),
        cost=_over_cost(points, names[0], styles, retentions),
        described=[_described(points, name, methods, retentions) for name in names if _says_what(points, name)],
        leaders=[(r, *_leaders(relative, measured, comparable[r], r)) for r in retentions if comparable[r]],
        duels=[(r, comparable[r], _duels(relative, measured, comparable[r], r)) for r in retentions],
        over_budget=[(r, [m for m in methods if (m, r) in points and m not in comparable[r]]) for r in retentions],
        distances=_distances(points, methods, retentions),
        dots=legend(styles, dots=True),
        scatters=_scatters(points, methods, retentions, styles),
        level=LEVEL_Q,
        mark=mark,
    )


def by_point(table: pa.Table) -> Points:
    """(method, retention) -> benchmark -> row of the table."""
    points: Points = {}
    for row in table.to_pylist():
        points.setdefault((row["method"], row["retention"]), {})[row["benchmark"]] = row
    return points


def mark(row: Row) -> str:
    """`lower` or `higher` if the score differs from the unpruned model's with q below LEVEL_Q, else an empty string."""
    if row["vs_none_q"] is None or row["vs_none_q"] >= LEVEL_Q:
        return ""
    return "lower" if row["vs_none"] < 0 else "higher"


def print_accuracy(table: pa.Table, folder: str) -> None:
    """Prints one row for each point: kept tokens, cost, share of the unpruned scores, score of every benchmark."""
    points = by_point(table)
    names = list(next(iter(points.values())))
    shown = Table("method", "kept", "TFLOPs", "ms/image", "relative", *map(short_name, names), box=None)
    for (method, retention), rows in points.items():
        first = rows[names[0]]
        tflops = first["tflops_per_image"]
        interval = f"({100 * first['relative_low']:.1f} to {100 * first['relative_high']:.1f})"
        shown.add_row(
            method if method == UNPRUNED else f"{method} {100 * retention:g} %",
            f"{first['num_kept_tokens']:.0f}",
            "-" if tflops is None else f"{tflops:.4g}",
            f"{first['ms_per_image']:.0f}",
            f"{100 * first['relative']:.1f} {interval}",
            *(f"{rows[name]['score']:.1f}" for name in names),
        )
    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False, markup=False, emoji=False)
    console.print(shown)
    console.print(f"page   {folder}/accuracy.html\ntable  {folder}/accuracy.parquet")


def short_name(benchmark: str) -> str:
    """The name of a benchmark in tables and charts: without the demo world, which is one in a grid."""
    return benchmark.removeprefix("demo_").removeprefix("gallery_")


def _plots(points: Points, names: list[str], styles: dict[str, Style], retentions: list[float]) -> list[Markup]:
    """Charts of `relative` and of every benchmark over retention. A level shows the value of the unpruned model."""
    charts = [("relative, %", lambda rows: _relative(rows[names[0]]))]
    charts += [(short_name(name), lambda rows, name=name: _score(rows[name])) for name in names]
    return [_plot(title, points, styles, retentions, ends_of) for title, ends_of in charts]


def _relative(row: Row) -> Ends:
    return 100 * row["relative"], 100 * row["relative_low"], 100 * row["relative_high"]


def _score(row: Row) -> Ends:
    return row["score"], row["low"], row["high"]


def _plot(
    title: str,
    points: Points,
    styles: dict[str, Style],
    retentions: list[float],
    ends_of: Callable[[dict[str, Row]], Ends],
) -> Markup:
    series = []
    for i, (method, style) in enumerate(styles.items()):
        marks = []
        for at, retention in enumerate(retentions):
            if rows := points.get((method, retention)):
                value, low, high = ends_of(rows)
                tooltip = f"{method} at {100 * retention:g} %: {value:.3g} ({low:.3g} to {high:.3g})"
                marks.append(Point(at + beside(i, len(styles)), value, y_ends=(low, high), title=tooltip))
        series.append(Series(method, marks, style))
    unpruned = ends_of(points[UNPRUNED, 1.0])[0]
    values = [unpruned, *(end for one in series for mark in one.points for end in mark.y_ends or ())]
    x = axis_of_names([f"{100 * retention:g} %" for retention in retentions], "tokens kept")
    return plot(series, x, axis_over(values, ""), title=title, levels=[(unpruned, "all tokens")])


def _over_cost(points: Points, name: str, styles: dict[str, Style], retentions: list[float]) -> Markup | None:
    """A chart of `relative` over the multiply-adds of everything, points over budget included; None if not counted."""
    measured = {point: rows[name] for point, rows in points.items() if rows[name]["tflops_per_image"] is not None}
    if (UNPRUNED, 1.0) not in measured or len(measured) < 2:
        return None
    series = []
    for method, style in styles.items():
        rows = [measured[method, retention] for retention in retentions if (method, retention) in measured]
        marks = [
            Point(
                row["tflops_per_image"],
                value,
                y_ends=(low, high),
                title=f"{method} at {100 * row['retention']:g} %: {value:.1f} % "
                f"for {row['tflops_per_image']:.3g} TFLOPs",
            )
            for row, (value, low, high) in ((row, _relative(row)) for row in rows)
        ]
        if marks:
            series.append(Series(method, marks, style))
    whole = measured[UNPRUNED, 1.0]
    x = axis_over([row["tflops_per_image"] for row in measured.values()], "TFLOPs of everything, an image and question")
    y = axis_over([100, *(end for one in series for mark in one.points for end in mark.y_ends or ())], "relative, %")
    title = f"all tokens: 100 % for {whole['tflops_per_image']:.3g} TFLOPs"
    return plot(series, x, y, title=title, levels=[(100, "all tokens")])


SAID = {
    "chair_s": "CHAIR, sentences",
    "chair_i": "CHAIR, objects",
    "object_recall": "recall",
    "object_f1": "F1",
    "described": "described",
    "color_accuracy": "colours",
    "size_accuracy": "sizes",
    "place_accuracy": "places",
    "looping": "loops",
    "words": "words",
}
"""What captions say of their pictures: ending of a metric's name -> its column. All but words are shares."""


def _says_what(points: Points, name: str) -> bool:
    return "chair_i" in _by_ending(points[UNPRUNED, 1.0][name])


def _by_ending(row: Row) -> dict[str, dict[str, Any]]:
    """The metrics of a benchmark by their names without its prefix."""
    return {metric["name"].split("_", 1)[-1]: metric for metric in row["metrics"]}


def _described(points: Points, name: str, methods: list[str], retentions: list[float]) -> dict[str, Any]:
    """The table of what the captions of a benchmark say: its columns, and (label, cells) of each point."""

    def cells(row: Row) -> list[tuple[str, str]]:
        by_name = _by_ending(row)
        scaled = [(1 if end == "words" else 100, by_name[end]) for end in columns]
        return [(f"{k * m['value']:.1f}", f"{k * m['low']:.1f} to {k * m['high']:.1f}") for k, m in scaled]

    unpruned = points[UNPRUNED, 1.0][name]
    columns = [end for end in SAID if end in _by_ending(unpruned)]
    rows = [
        (f"{method} {100 * retention:g} %", cells(points[method, retention][name]))
        for retention in retentions
        for method in methods
        if (method, retention) in points
    ]
    head = [SAID[end] for end in columns]
    return {"name": short_name(name), "columns": head, "rows": [(UNPRUNED, cells(unpruned)), *rows]}


def _leaders(
    relative: Relative, measured: Sequence[Measured], methods: list[str], retention: float
) -> tuple[tuple[str, float], list[tuple[str, float]]]:
    """The method with the best `relative` at this retention, and the methods that it does not beat for sure.

    A tie is a method whose difference from the best has a 95 % interval that holds zero. Values are in per cent.
    """
    indices = [(m, measured.index(p)) for m in methods if (p := find_point(measured, m, retention))]
    best, i = max(indices, key=lambda pair: relative.values[pair[1]])
    ties = [(m, j) for m, j in indices if j != i and relative.difference(i, j)[1] <= 0]
    ties.sort(key=lambda pair: -relative.values[pair[1]])
    return (best, 100 * relative.values[i]), [(m, 100 * relative.values[j]) for m, j in ties]


def _duels(
    relative: Relative, measured: Sequence[Measured], methods: list[str], retention: float
) -> list[list[tuple[str, str, str]]]:
    """(outcome, difference, interval) of every pair: row method minus column method, in points of `relative`."""
    indices = [measured.index(p) for m in methods if (p := find_point(measured, m, retention))]
    rows = []
    for a in indices:
        row = []
        for b in indices:
            if a == b:
                row.append(("same", "", ""))
                continue
            difference, low, high = (100 * value for value in relative.difference(a, b))
            outcome = "win" if low > 0 else "loss" if high < 0 else "tie"
            row.append((outcome, f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}"))
        rows.append(row)
    return rows


def _distances(points: dict, methods: list[str], retentions: list[float]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of both distances with `relative` over methods, at each retention.

    Points over budget count as well. Retentions with fewer than four measured methods are left out.
    """
    from scipy.stats import spearmanr

    correlations = []
    for retention in retentions:
        rows = [next(iter(points[m, retention].values())) for m in methods if (m, retention) in points]
        with_distance = [row for row in rows if row["gaussian_w2"] is not None]
        accuracy = [row["relative"] for row in with_distance]
        if len(with_distance) < 4 or len(set(accuracy)) == 1:  # a constant has no rank correlation
            continue
        entry: dict[str, Any] = {"retention": retention, "methods": len(with_distance)}
        for name in ("trace_objective", "gaussian_w2"):
            rho, p = np.asarray(spearmanr([row[name] for row in with_distance], accuracy))
            entry[name] = (float(rho), float(p))
        correlations.append(entry)
    return correlations


def _scatters(points: Points, methods: list[str], retentions: list[float], styles: dict[str, Style]) -> list[Markup]:
    """A chart of `relative` over the Gaussian W2 at each retention, points over budget included."""
    plots = []
    for retention in retentions:
        rows = [next(iter(points[m, retention].values())) for m in methods if (m, retention) in points]
        dots = {r["method"]: (r["gaussian_w2"], 100 * r["relative"]) for r in rows if r["gaussian_w2"] is not None}
        if len(dots) > 1:
            series = [Series(name, [Point(*dot)], styles[name], joined=False) for name, dot in dots.items()]
            x = axis_over([x for x, _ in dots.values()], "Gaussian W2, all to kept")
            y = axis_over([y for _, y in dots.values()], "relative, %")
            plots.append(plot(series, x, y, title=f"{100 * retention:g} % of the tokens"))
    return plots
