"""The terminal summary of the quality of captions."""

from typing import TYPE_CHECKING

from rich.table import Table

from pipelines.quality.captions import measured_parts
from pipelines.report.terminal import make_console

if TYPE_CHECKING:
    from pipelines.quality.captions import Quality


def print_quality(quality: "Quality", max_same: float) -> None:
    """Prints all metrics as a table, and the verdict of the canary; `max_same` is the threshold of the canary."""
    table = Table("of", "metric", "value", "95 % interval", box=None, pad_edge=False)
    for name, value in quality.health.items():
        ends = quality.health_intervals.get(name)
        shown = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
        table.add_row(f"{quality.captions:,} captions", name, f"{value:.4f}", shown)
    canary = quality.canary
    measured_on = {
        "agreement": f"{quality.agreed_on:,} captions and the baseline's",
        "references": f"{quality.referenced:,} captions and references",
        "objects": f"{quality.known:,} captions and the objects of their images",
        "canary": f"{canary.captions:,} captions of {canary.images:,} images without them" if canary else "",
    }
    for part, measured in measured_parts(quality):
        for name, (value, low, high) in measured.items():
            table.add_row(measured_on[part], name, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    console = make_console()
    console.print(table)
    if quality.judged is not None:
        console.print(f"judge   {quality.judged}")
    if canary:
        verdict = "depend on their images" if canary.saw_the_images else "DO NOT DEPEND on their images"
        left_out = f"; {canary.left_out} sampled images left out" if canary.left_out else ""
        console.print(f"canary  captions {verdict}: at most {max_same:.0%} may stay the same{left_out}")
    if not quality.captions:
        console.print("there are no captions at output.path yet: the canary alone was measured")
