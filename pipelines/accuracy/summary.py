"""The terminal summary of an evaluation."""

from typing import TYPE_CHECKING

from rich.table import Table

from pipelines.report.terminal import _interval, make_console

if TYPE_CHECKING:
    from pipelines.accuracy.evaluate import Evaluation, Results
    from pipelines.run.outcome import Outcome


def print_scores(evaluation: "Evaluation", outcome: "Outcome", results: "Results | None") -> None:
    """Prints the scores in the papers' units, the speed, and the paths of the predictions and the report."""
    console = make_console()
    if results:
        columns = ["benchmark", "metric", "score", "95 % interval", "questions", "unanswered"]
        columns += ["minus baseline", "95 % interval", "p"] if results.comparisons else []
        table = Table(*columns, box=None, pad_edge=False)
        for scores in results.scores:
            row = [scores.benchmark, scores.headline, f"{scores.scale * scores.metrics[scores.headline]:.2f}"]
            row += [_interval(scores.intervals[scores.headline], scores.scale, "")]
            row += [f"{scores.questions:,}", f"{scores.unanswered:,}"]
            if compared := results.comparisons.get(scores.benchmark):
                row += [f"{scores.scale * compared.difference:+.2f}", _interval(compared.interval, scores.scale, "+")]
                row += [f"{compared.p:.2g} ({compared.test})"]
            table.add_row(*row)
        console.print(table)
    job, metrics = evaluation.job, outcome.metrics
    table = Table(show_header=False, box=None, pad_edge=False)
    if outcome.message:
        table.add_row("status", outcome.message)
    if job.plan.num_done:
        table.add_row("before", f"{job.plan.num_done:,} of {job.plan.num_rows:,} questions were done before this run")
    if metrics:
        rates = f"{metrics['questions_per_second']:.1f} questions/s, {metrics['images_per_second']:.1f} images/s"
        table.add_row("speed", f"{rates} once started; {metrics['wall_seconds']:.0f} s in all")
    table.add_row("predictions", f"{job.output.path}/{job.folder}/*.parquet")
    if results:
        table.add_row("report", f"{job.output.path}/scores.html")
    if outcome.tracked:
        table.add_row("mlflow", outcome.tracked)
    console.print(table)
