"""Renders report.html of a caption job: what the run did, what it cost, and samples of its captions."""

from typing import TYPE_CHECKING, Any

from pipelines.config.load import to_yaml
from pipelines.output.schema import REASONS
from pipelines.output.totals import Totals
from pipelines.report.environment import render_page

if TYPE_CHECKING:
    from pipelines.run.job import Job
    from pipelines.run.outcome import Outcome

STAGES = ("read", "decode", "encode", "generate", "write")
COMPARED = ("source", "row", "prompt", "pruned", "unpruned", "references")
SHOWN_COMPARED = 12


def render_report(job: "Job", outcome: "Outcome", totals: Totals) -> str:
    """The page, as HTML, for one run and for the output that the run wrote to."""
    metrics, gate = outcome.metrics, outcome.gate
    dollars = [
        (name, metrics[f"usd/{name}"]) for name in (*STAGES, "gate", "startup", "idle") if f"usd/{name}" in metrics
    ]
    seconds = [(stage, totals.seconds[stage]) for stage in STAGES]
    longest = max((value for _, value in seconds), default=0) or 1
    return render_page(
        "report/captions.html.jinja",
        kind="caption report",
        fingerprint=job.fingerprint,
        config_yaml=to_yaml(job.config),
        machines=(f"{outcome.cluster}.",) if outcome.cluster else (),
        config=job.config,
        outcome=outcome,
        metrics=metrics,
        dollars=[(name, usd, 100 * usd / max(1e-12, metrics["usd_total"])) for name, usd in dollars],
        gate=gate,
        compared=[_compared(image) for image in gate.compared[:SHOWN_COMPARED]] if gate else [],
        totals=totals,
        crop_shares=totals.crop_shares(),
        num_rows=job.plan.num_rows,
        stages=[(stage, value, 100 * value / longest) for stage, value in seconds],
        reasons=[(reason, REASONS[reason], count) for reason, count in totals.reasons.most_common()],
        samples=[_sample(sample) for sample in outcome.samples],
    )


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A sampled image with `labelled`, its (prompt, caption) pairs."""
    captions = [done["caption"] for done in sample["captions"]]
    return {**sample, "labelled": list(zip(sample["prompts"], captions, strict=True)), "shade": pruned_area(sample)}


def _compared(compared: Any) -> dict[str, Any]:
    """An image of the gate's sample, with its pruned and its unpruned caption."""
    image = {name: getattr(compared, name) for name in COMPARED} | compared.picture
    return image | {"shade": pruned_area(image)}


def pruned_area(sample: dict[str, Any]) -> str:
    """SVG path that covers the thumbnail except the patches of the kept tokens; fill it by the even-odd rule.

    A merged token shows the patch that it grew from. A token without a place of its own (index -1) shows no patch. The
    path is empty if all tokens were kept, or if the tokens form no grid.
    """
    width, height, rows, columns = (sample[name] for name in ("width", "height", "rows", "columns"))
    if len(sample["kept"]) == rows * columns or not rows:
        return ""
    across, down = width / columns, height / rows
    holes = (
        f"M{token % columns * across:g} {token // columns * down:g}h{across:g}v{down:g}h{-across:g}z"
        for token in sample["kept"]
        if token >= 0
    )
    return f"M0 0H{width}V{height}H0z" + "".join(holes)
