"""The terminal summary of a study."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from pipelines.report.terminal import make_console

if TYPE_CHECKING:
    from pipelines.run.outcome import Outcome
    from pipelines.study.pieces import Conclusion
    from pipelines.study.run import Study


def print_study(study: "Study", outcome: "Outcome", conclusions: "Mapping[str, Conclusion]") -> None:
    """Prints the findings of each experiment, the counts of pieces, and the paths of the page and the tables."""
    console = make_console()
    for name, conclusion in conclusions.items():
        console.print(f"{name}")
        for finding in conclusion.findings:
            console.print(f"  - {finding}")
    table = Table(show_header=False, box=None, pad_edge=False)
    if outcome.message:
        table.add_row("status", outcome.message)
    table.add_row("pieces", f"{len(study.pieces):,}, of which {len(study.missing):,} were missing")
    if "wall_seconds" in outcome.metrics:
        table.add_row("time", f"{outcome.metrics['wall_seconds']:.0f} s")
    if conclusions:
        table.add_row("page", f"{study.output.path}/study.html")
        table.add_row("tables", f"{study.output.path}/results/*.parquet")
    if outcome.tracked:
        table.add_row("mlflow", outcome.tracked)
    console.print(table)
