"""accuracy.html: the grid's table for people, self-contained; and its short form for the terminal."""

import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from otprune.methods import UNPRUNED
from otprune.methods.positional import BLIND
from pipelines.accuracy.config import AccuracyConfig
from pipelines.accuracy.table import Measured, Relative, find_point, relative_scores
from pipelines.benchmarks import Benchmark
from pipelines.config.load import to_yaml
from pipelines.report.plots import line_chart, scatter, series_styles

Row = dict[str, Any]
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
    styles = series_styles(compared, quiet=[method.name for method in BLIND])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    relative = relative_scores(measured, benches, config.resamples)
    return environment.get_template("grid.html.jinja").render(
        config=config,
        config_yaml=to_yaml(config),
        made=date.today().isoformat(),
        names=[(name, name.removeprefix("demo_")) for name in names],
        unpruned=points[UNPRUNED, 1.0],
        blocks=[(r, [points[m, r] for m in methods if (m, r) in points]) for r in retentions],
        styles=styles,
        charts=_charts(within, names, compared, retentions, styles),
        leaders=[(r, *_leaders(relative, measured, rivals[r], r)) for r in retentions if rivals[r]],
        duels=[(r, rivals[r], _duels(relative, measured, rivals[r], r)) for r in retentions],
        over_budget=[(r, [m for m in methods if (m, r) in points and m not in rivals[r]]) for r in retentions],
        distances=_distances(points, methods, retentions),
        scatters=_scatters(points, methods, retentions, styles),
        level=LEVEL_Q,
        mark=mark,
    )


def by_point(table: pa.Table) -> dict[tuple[str, float], dict[str, Row]]:
    """(method, retention) -> benchmark -> row of the table."""
    points: dict[tuple[str, float], dict[str, Row]] = {}
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


def _charts(points: dict, names: list[str], methods: list[str], retentions: list[float], styles: dict) -> list[str]:
    labels = [f"{100 * r:g} %" for r in retentions]
    charts = []
    for name in ("relative", *names):
        first = name == "relative"

        def of(row: Row, first: bool = first) -> tuple[float, float, float]:
            keys = ("relative", "relative_low", "relative_high") if first else ("score", "low", "high")
            value, low, high = (row[key] * (100 if first else 1) for key in keys)
            return value, low, high

        def row_of(method: str, retention: float, name: str = name, first: bool = first) -> Row | None:
            rows = points.get((method, retention))
            return rows and rows[names[0] if first else name]

        series = {m: [None if row is None else of(row) for r in retentions for row in [row_of(m, r)]] for m in methods}
        full = of(points[UNPRUNED, 1.0][names[0] if first else name])[0]
        title = "relative, %" if first else name.removeprefix("demo_")
        charts.append(line_chart(title, labels, series, styles, level=("all tokens", full)))
    return charts


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


def _scatters(points: dict, methods: list[str], retentions: list[float], styles: dict) -> list[str]:
    charts = []
    for retention in retentions:
        rows = [next(iter(points[m, retention].values())) for m in methods if (m, retention) in points]
        known = [(r["method"], r["gaussian_w2"], 100 * r["relative"]) for r in rows if r["gaussian_w2"] is not None]
        if len(known) > 1:
            charts.append(scatter(f"relative, % at {100 * retention:g} %", "Gaussian W2, all to kept", known, styles))
    return charts
