"""The last thing that a sweep prints: its points, the advice, and where everything is."""

from collections.abc import Sequence

from rich.table import Table

from pipelines.report.terminal import make_console
from pipelines.sweep.advice import has_prices, percent, settings_of
from pipelines.sweep.checked import Sweep
from pipelines.sweep.dry_run import Estimate
from pipelines.sweep.run import SweepOutcome


def print_sweep(sweep: Sweep, outcome: SweepOutcome) -> None:
    """The finished points, cheapest first, and the advice, on stdout."""
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
    """A table of the points with what is still to come, and its sum, on stdout."""
    table = Table("point", "images", "seconds", "$", "", box=None, pad_edge=False)
    for each in estimates:
        seconds = "?" if each.seconds is None else f"{each.seconds:,.0f}"
        usd = "?" if each.usd is None else f"{each.usd:.4f}"
        table.add_row(each.point.name, f"{each.images:,}", seconds, usd, each.note)
    known = [each for each in estimates if each.seconds is not None]
    dollars = [each.usd for each in known if each.usd is not None]
    total = f"{sum(each.seconds or 0.0 for each in known):,.0f}"
    table.add_row(f"{len(estimates)} points", "", total, f"{sum(dollars):.4f}" if dollars else "?", "in all")
    out = make_console()
    out.print(table)
    if not dollars:
        out.print("set cost.usd_per_hour to see dollars")
