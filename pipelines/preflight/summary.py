"""Prints an estimate on the terminal."""

from typing import TYPE_CHECKING

from rich.table import Table

from pipelines.report.terminal import make_console

if TYPE_CHECKING:
    from pipelines.preflight.extrapolate import Estimate, MachineEstimate
    from pipelines.run.job import Job


def print_estimate(job: "Job", estimate: "Estimate", tracked: str) -> None:
    """Prints two tables on stdout: the work to do, and its time and dollars on each kind of machine."""
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
    for machine in (estimate.here, *estimate.instances):
        price = "?" if machine.usd_per_hour is None else f"{machine.usd_per_hour:g}"
        row = [
            machine.name,
            price,
            "not measured" if machine.speed is None else f"{machine.speed:g} x",
            _time(machine.seconds.value),
        ]
        row.append(f"{_time(machine.seconds.low)} to {_time(machine.seconds.high)}")
        if machine.usd is not None and machine.usd_per_hour is not None:
            startup = estimate.fixed_seconds * machine.usd_per_hour / 3600
            row += [
                f"${machine.usd.value:,.4f}",
                f"${machine.usd.low:,.4f} to ${machine.usd.high:,.4f}",
                f"${startup:,.4f}",
            ]
        table.add_row(*row)
    console.print(table)
    if estimate.here.usd_per_hour is None:
        console.print("This cluster has no price: set cost.usd_per_hour, or price its nodes by cost.prices and labels.")
    for machine in (machine for machine in estimate.instances if machine.speed is None):
        unknown = "speed not measured, so the table takes the speed of this cluster"
        console.print(f"{machine.name}: {unknown}{_break_even(estimate, machine)}.")


def _break_even(estimate: "Estimate", machine: "MachineEstimate") -> str:
    """The speed from which the machine is cheaper than the connected cluster; empty without both prices."""
    here = estimate.here.usd_per_hour
    if not here or machine.usd_per_hour is None:
        return ""
    return f"; it is cheaper from {machine.usd_per_hour / here / estimate.seconds_per_image:,.1f} images/s on"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
