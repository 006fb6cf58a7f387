"""What a caption job prints at its end: its results, its cost, and where the output is."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pipelines.run.job import Job
    from pipelines.run.outcome import Outcome


def print_summary(job: "Job", outcome: "Outcome") -> None:
    """Prints the summary of a run as a table on stdout."""
    metrics = outcome.metrics
    table = Table(show_header=False, box=None, pad_edge=False)
    if outcome.message:
        table.add_row("status", outcome.message)
    if job.plan.num_done:
        table.add_row("before", f"{job.plan.num_done:,} of {job.plan.num_rows:,} rows were done before this run")
    if metrics:
        captioned, quarantined = metrics["images_captioned"], metrics["images_quarantined"]
        table.add_row("images", f"{captioned:,} captioned and {quarantined:,} quarantined in this run")
        rates = f"{metrics['images_per_second']:.1f} images/s, {metrics['tokens_per_second']:.0f} tokens/s"
        table.add_row("speed", f"{rates} once started; {metrics['wall_seconds']:.0f} s in all")
    if "kept_from/overview" in metrics:
        table.add_row("tiles", _overview_line(metrics))
        if glitches := _glitches(metrics):
            table.add_row("glitches", glitches)
    if "usd_total" in metrics:
        table.add_row("cost", f"${metrics['usd_total']:.4f}{_per_million(metrics)}")
        if "idle_share" in metrics:  # absent if the run did nothing
            idle = metrics["idle_share"]
            dollars = f"${idle * metrics['usd_total']:.4f}"
            table.add_row("idle", f"{idle:.0%} of what was paid for had no work ({dollars}), start-up included")
        if metrics.get("usd_of_output", 0) > metrics["usd_total"]:
            table.add_row("in all", f"${metrics['usd_of_output']:.4f} for this output, earlier runs included")
    if outcome.gate:
        table.add_row("gate", f"{outcome.gate}")
    for sample in outcome.samples[:3]:
        table.add_row("caption", f"{sample['captions'][0]['caption']}")
    table.add_row("captions", f"{job.output.path}/captions/*.parquet")
    if metrics.get("images_quarantined"):
        table.add_row("quarantine", f"{job.output.path}/quarantine/*.parquet")
    table.add_row("report", f"{job.output.path}/report.html")
    if outcome.tracked:
        table.add_row("mlflow", outcome.tracked)
    make_console().print(table)


def _overview_line(metrics: Mapping[str, float]) -> str:
    """What pictures in tiles keep of their overviews and of their tiles."""
    overview, tiles = metrics["retention/overview"], metrics["retention/tiles"]
    kept = f"kept {overview:.0%} of the overviews' tokens and {tiles:.0%} of the tiles'"
    return f"{kept}; {metrics['kept_from/overview']:.0%} of what was kept shows the whole picture"


def _glitches(metrics: Mapping[str, float]) -> str:
    """What was wrong with captions, and what trying again did; empty if nothing was. Old records know no loops."""
    parts = []
    if retried := metrics.get("captions_retried"):
        usd = f", ${metrics['usd_of_retries']:.4f}" if "usd_of_retries" in metrics else ""
        cost = f"{metrics['retry_tokens']:,} tokens{usd}"
        parts.append(f"{retried:,} captions tried again ({cost}), {metrics['captions_repaired']:,} repaired")
    if looping := metrics.get("finished_by_loop"):
        parts.append(f"{looping:.1%} end in a loop")
    if cut := metrics.get("finished_by_length"):
        parts.append(f"{cut:.1%} are cut at generate.max_new_tokens")
    return "; ".join(parts)


def _per_million(metrics: Mapping[str, float]) -> str:
    if unpriced := metrics.get("nodes_unpriced"):
        return f" without {unpriced} nodes that have no price"
    if "usd_per_million_images" not in metrics:
        return ""
    steady = metrics.get("usd_per_million_images_steady")
    without = f", ${steady:,.2f} without it" if steady else ""
    return f", ${metrics['usd_per_million_images']:,.2f} per million images, start-up included{without}"


def _interval(ends: tuple[float, float], scale: float, sign: str) -> str:
    return f"{scale * ends[0]:{sign}.2f} to {scale * ends[1]:{sign}.2f}"


def make_console() -> Console:
    """A console that prints text unchanged: rich would read brackets in captions and paths as markup.

    Output that is not a terminal gets 200 columns, so that logs do not break paths.
    """
    width = None if sys.stdout.isatty() else 200
    return Console(width=width, highlight=False, markup=False, emoji=False)
