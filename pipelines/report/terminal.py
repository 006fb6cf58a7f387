"""The last thing that a job prints: what came out, what it cost, and where everything is."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pipelines.quality.captions import measured_parts

if TYPE_CHECKING:
    from pipelines.accuracy.evaluate import Evaluation, Results
    from pipelines.preflight.estimate import Estimate, On
    from pipelines.quality.captions import Quality
    from pipelines.run.job import Job
    from pipelines.run.run import Outcome
    from pipelines.study.pieces import Conclusion
    from pipelines.study.run import Study


def print_summary(job: "Job", outcome: "Outcome") -> None:
    """A table on stdout."""
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
    if "usd_total" in metrics:
        table.add_row("cost", f"${metrics['usd_total']:.4f}{_per_million(metrics)}")
        if "usd/idle" in metrics:
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


def _per_million(metrics: Mapping[str, float]) -> str:
    if unpriced := metrics.get("nodes_unpriced"):
        return f" without {unpriced} nodes that have no price"
    if "usd_per_million_images" not in metrics:
        return ""
    steady = metrics.get("usd_per_million_images_steady")
    without = f", ${steady:,.2f} without it" if steady else ""
    return f", ${metrics['usd_per_million_images']:,.2f} per million images, start-up included{without}"


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


def print_scores(evaluation: "Evaluation", outcome: "Outcome", results: "Results | None") -> None:
    """A table of scores on stdout, in the papers' units, and where everything is."""
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


def print_quality(quality: "Quality", max_same: float) -> None:
    """A table on stdout; `max_same` is the canary's gate."""
    table = Table("of", "metric", "value", "95 % interval", box=None, pad_edge=False)
    for name, value in quality.health.items():
        table.add_row(f"{quality.captions:,} captions", name, f"{value:.4f}", "")
    seen = quality.canary
    of = {
        "agreement": f"{quality.agreed_on:,} captions and the baseline's",
        "references": f"{quality.referenced:,} captions and references",
        "canary": f"{seen.captions:,} captions of {seen.images:,} images without them" if seen else "",
    }
    for part, measured in measured_parts(quality):
        for name, (value, low, high) in measured.items():
            table.add_row(of[part], name, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    console = make_console()
    console.print(table)
    if seen:
        verdict = "depend on their images" if seen.saw_the_images else "DO NOT DEPEND on their images"
        left_out = f"; {seen.left_out} sampled images left out" if seen.left_out else ""
        console.print(f"canary  captions {verdict}: at most {max_same:.0%} may stay the same{left_out}")
    if not quality.captions:
        console.print("there are no captions at output.path yet: the canary alone was measured")


def _interval(ends: tuple[float, float], scale: float, sign: str) -> str:
    return f"{scale * ends[0]:{sign}.2f} to {scale * ends[1]:{sign}.2f}"


def make_console() -> Console:
    """Prints text as it is: captions and paths may hold brackets, which rich would read as markup."""
    width = None if sys.stdout.isatty() else 200
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_study(study: "Study", outcome: "Outcome", conclusions: "Mapping[str, Conclusion]") -> None:
    """What each experiment found, on stdout, and where everything is."""
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
