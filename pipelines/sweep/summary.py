"""What a sweep prints at its end: its points, the advice, and where the results are."""

from collections.abc import Sequence

from rich.table import Table

from pipelines.report.terminal import make_console
from pipelines.sweep.checked import Sweep
from pipelines.sweep.dry_run import Estimate
from pipelines.sweep.run import SweepOutcome
from pipelines.sweep.setting import has_prices, percent, settings_of


def print_sweep(sweep: Sweep, outcome: SweepOutcome) -> None:
    """Prints the finished points, cheapest first, and the advice."""
    out, records = make_console(), list(outcome.records.values())
    unit = "$" if has_prices(records) else "hours"
    columns = ["setting", "cluster", f"{unit} per million", "95 % interval", "images/s", "quality, % of unpruned"]
    table = Table(*columns, box=None, pad_edge=False)
    for s in settings_of(records):
        ends = f"{s.cost[1]:,.2f} to {s.cost[2]:,.2f}"
        table.add_row(s.label, s.values["cluster"], f"{s.cost[0]:,.2f}", ends, f"{s.rate:.1f}", percent(s.quality))
    if table.row_count:
        out.print(table)
    table = Table(show_header=False, box=None, pad_edge=False)
    if outcome.message:
        table.add_row("status", outcome.message)
    counts = f"{outcome.skipped} finished before, {len(records) - outcome.skipped} run now"
    table.add_row("points", f"{len(sweep.points)}: {counts}")
    if outcome.advice:
        table.add_row("advice", outcome.advice.headline)
        for text in (*outcome.advice.reasons, *outcome.advice.warnings):
            table.add_row("", text)
    table.add_row("report", f"{sweep.output.path}/report.html")
    if outcome.tracked:
        table.add_row("mlflow", outcome.tracked)
    out.print(table)


def print_estimates(estimates: Sequence[Estimate]) -> None:
    """Prints the points with the seconds and dollars that each still needs, and their sum."""
    table = Table("point", "images", "seconds", "$", "", box=None, pad_edge=False)
    for estimate in estimates:
        seconds = "?" if estimate.seconds is None else f"{estimate.seconds:,.0f}"
        usd = "?" if estimate.usd is None else f"{estimate.usd:.4f}"
        table.add_row(estimate.point.name, f"{estimate.images:,}", seconds, usd, estimate.note)
    known = [estimate for estimate in estimates if estimate.seconds is not None]
    dollars = [estimate.usd for estimate in known if estimate.usd is not None]
    total = f"{sum(estimate.seconds or 0.0 for estimate in known):,.0f}"
    table.add_row(f"{len(estimates)} points", "", total, f"{sum(dollars):.4f}" if dollars else "?", "in all")
    out = make_console()
    out.print(table)
    if not dollars:
        out.print("set cost.usd_per_hour to see dollars")
