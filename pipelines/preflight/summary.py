"""The terminal summary of an estimate."""

from typing import TYPE_CHECKING

from rich.table import Table

from pipelines.report.terminal import make_console

if TYPE_CHECKING:
    from pipelines.preflight.estimate import Estimate, On
    from pipelines.run.job import Job


def print_estimate(job: "Job", estimate: "Estimate", tracked: str) -> None:
    """Two tables on stdout: what there is to do, and what it takes on each kind of machine."""
    console, images, size = make_console(), estimate.images, estimate.output_bytes
    table = Table(show_header=False, box=None, pad_edge=False)
    sample = f"{estimate.sample_images:,} images in {estimate.sample_units} units, drawn over the whole corpus"
    lost = f"; {estimate.sample_lost} more units did not come through" if estimate.sample_lost else ""
    cost = "" if estimate.sample_usd is None else f"; it cost ${estimate.sample_usd:.4f}"
    table.add_row("sample", f"{sample}{lost}{cost}")
    table.add_row("to do", f"{estimate.rows:,} of {job.plan.num_rows:,} rows")
    table.add_row(
        "images", f"{images.value:,.0f} captioned ({images.low:,.0f} to {images.high:,.0f}), others quarantined"
    )
    table.add_row("output", f"{size.value / 2**20:,.2f} MiB ({size.low / 2**20:,.2f} to {size.high / 2**20:,.2f})")
    table.add_row("speed", f"{1 / estimate.seconds_per_image:,.1f} images/s once started, on {estimate.cluster}")
    table.add_row("start-up", f"{_time(estimate.fixed_seconds)} of the time below, whatever the number of images")
    table.add_row("mlflow", tracked)
    console.print(table)
    table = Table("on", "$/hour", "speed", "time", "90 % interval", "dollars", "90 % interval", "start-up", box=None)
    for on in (estimate.here, *estimate.instances):
        price = "?" if on.usd_per_hour is None else f"{on.usd_per_hour:g}"
        row = [on.name, price, "not measured" if on.speed is None else f"{on.speed:g} x", _time(on.seconds.value)]
        row.append(f"{_time(on.seconds.low)} to {_time(on.seconds.high)}")
        if on.usd is not None and on.usd_per_hour is not None:
            startup = estimate.fixed_seconds * on.usd_per_hour / 3600
            row += [f"${on.usd.value:,.4f}", f"${on.usd.low:,.4f} to ${on.usd.high:,.4f}", f"${startup:,.4f}"]
        table.add_row(*row)
    console.print(table)
    if estimate.here.usd_per_hour is None:
        console.print("This cluster has no price: set cost.usd_per_hour, or price its nodes by cost.prices and labels.")
    for on in (on for on in estimate.instances if on.speed is None):
        unknown = "shown as if it were as fast as this cluster, which nobody has measured"
        console.print(f"{on.name}: {unknown}{_even(estimate, on)}.")


def _even(estimate: "Estimate", on: "On") -> str:
    here = estimate.here.usd_per_hour
    if not here or on.usd_per_hour is None:
        return ""
    return f"; it is cheaper from {on.usd_per_hour / here / estimate.seconds_per_image:,.1f} images/s on"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
