"""accuracy.html: the grid's table for people, self-contained; and its short form for the terminal."""

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
LEVEL_Q = 0.05  # below it a difference is marked


def render_accuracy(
    config: AccuracyConfig, table: pa.Table, measured: Sequence[Measured], benches: Sequence[Benchmark]
) -> str:
    """The page."""
    points, names = by_point(table), [bench.name for bench in benches]
    methods = list(dict.fromkeys(method for method, _ in points if method != UNPRUNED))
    methods.sort(key=lambda m: config.grid.methods.index(m))
    retentions = sorted({retention for method, retention in points if method != UNPRUNED}, reverse=True)
    within = {point: rows for point, rows in points.items() if not rows[names[0]]["over_budget"]}
    rivals = {r: [m for m in methods if (m, r) in within] for r in retentions}
    compared = [m for m in methods if any(m in rivals[r] for r in retentions)]
    styles = styles_of(methods, quiet=[method.name for method in BLIND])
    drawn = {method: styles[method] for method in compared}
    relative = relative_scores(measured, benches, config.resamples)
    return render_page(
        "accuracy/grid.html.jinja",
        kind="accuracy grid",
        fingerprint=fingerprint(config.dotted()),
        config_yaml=to_yaml(config),
        config=config,
        names=[(name, name.removeprefix("demo_")) for name in names],
        unpruned=points[UNPRUNED, 1.0],
        blocks=[(r, [points[m, r] for m in methods if (m, r) in points]) for r in retentions],
        legend=legend(drawn),
        plots=_plots(within, names, drawn, retentions),
        leaders=[(r, *_leaders(relative, measured, rivals[r], r)) for r in retentions if rivals[r]],
        duels=[(r, rivals[r], _duels(relative, measured, rivals[r], r)) for r in retentions],
        over_budget=[(r, [m for m in methods if (m, r) in points and m not in rivals[r]]) for r in retentions],
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
    """`lower` or `higher` where the score is surely another than the unpruned model's, else nothing."""
    if row["vs_none_q"] is None or row["vs_none_q"] >= LEVEL_Q:
        return ""
    return "lower" if row["vs_none"] < 0 else "higher"


def print_accuracy(table: pa.Table, folder: str) -> None:
    """A row for each point on stdout: what it keeps, what is left of the unpruned scores, every benchmark."""
    points = by_point(table)
    names = list(next(iter(points.values())))
    shown = Table(
        "method", "kept", "TFLOPs", "ms/image", "relative", *(n.removeprefix("demo_") for n in names), box=None
    )
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


def _plots(points: Points, names: list[str], styles: dict[str, Style], retentions: list[float]) -> list[Markup]:
    """`relative` and every benchmark over retention, with the unpruned model's as a level."""
    shown = [("relative, %", lambda rows: _relative(rows[names[0]]))]
    shown += [(name.removeprefix("demo_"), lambda rows, name=name: _score(rows[name])) for name in names]
    return [_plot(title, points, styles, retentions, ends_of) for title, ends_of in shown]


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
    full = ends_of(points[UNPRUNED, 1.0])[0]
    values = [full, *(end for one in series for mark in one.points for end in mark.y_ends or ())]
    x = axis_of_names([f"{100 * retention:g} %" for retention in retentions], "tokens kept")
    return plot(series, x, axis_over(values, ""), title=title, levels=[(full, "all tokens")])


def _leaders(
    relative: Relative, measured: Sequence[Measured], methods: list[str], retention: float
) -> tuple[tuple[str, float], list[tuple[str, float]]]:
    """The method of `methods` with the best `relative` at this retention, and those that it does not surely beat."""
    found = [(m, measured.index(p)) for m in methods if (p := find_point(measured, m, retention))]
    best, i = max(found, key=lambda pair: relative.values[pair[1]])
    ties = [(m, j) for m, j in found if j != i and relative.difference(i, j)[1] <= 0]
    ties.sort(key=lambda pair: -relative.values[pair[1]])
    return (best, 100 * relative.values[i]), [(m, 100 * relative.values[j]) for m, j in ties]


def _duels(
    relative: Relative, measured: Sequence[Measured], methods: list[str], retention: float
) -> list[list[tuple[str, str, str]]]:
    """Row method minus column method in points of `relative`: (outcome, difference, interval) of every pair."""
    where = [measured.index(p) for m in methods if (p := find_point(measured, m, retention))]
    rows = []
    for a in where:
        row = []
        for b in where:
            if a == b:
                row.append(("same", "", ""))
                continue
            difference, low, high = (100 * value for value in relative.difference(a, b))
            outcome = "win" if low > 0 else "loss" if high < 0 else "tie"
            row.append((outcome, f"{difference:+.1f}", f"{low:+.1f} to {high:+.1f}"))
        rows.append(row)
    return rows


def _distances(points: dict, methods: list[str], retentions: list[float]) -> list[dict[str, Any]]:
    """Spearman's rank correlation over methods of both distances with `relative`, at each retention."""
    from scipy.stats import spearmanr

    found = []
    for retention in retentions:
        rows = [next(iter(points[m, retention].values())) for m in methods if (m, retention) in points]
        known = [row for row in rows if row["gaussian_w2"] is not None]
        accuracy = [row["relative"] for row in known]
        if len(known) < 4 or len(set(accuracy)) == 1:  # equals have no ranks
            continue
        entry: dict[str, Any] = {"retention": retention, "methods": len(known)}
        for name in ("trace_objective", "gaussian_w2"):
            rho, p = np.asarray(spearmanr([row[name] for row in known], accuracy))
            entry[name] = (float(rho), float(p))
        found.append(entry)
    return found


def _scatters(points: Points, methods: list[str], retentions: list[float], styles: dict[str, Style]) -> list[Markup]:
    """`relative` over the distance, at each retention."""
    plots = []
    for retention in retentions:
        rows = [next(iter(points[m, retention].values())) for m in methods if (m, retention) in points]
        known = {r["method"]: (r["gaussian_w2"], 100 * r["relative"]) for r in rows if r["gaussian_w2"] is not None}
        if len(known) > 1:
            series = [Series(name, [Point(*at)], styles[name], joined=False) for name, at in known.items()]
            x = axis_over([x for x, _ in known.values()], "Gaussian W2, all to kept")
            y = axis_over([y for _, y in known.values()], "relative, %")
            plots.append(plot(series, x, y, title=f"{100 * retention:g} % of the tokens"))
    return plots
