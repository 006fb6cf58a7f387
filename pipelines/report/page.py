"""Renders report.html of a caption job: what the run did, what it cost, and samples of its captions."""

import math
from typing import TYPE_CHECKING, Any

from pipelines.config.load import to_yaml
from pipelines.output.schema import REASONS
from pipelines.output.totals import Totals
from pipelines.report.environment import render_page

if TYPE_CHECKING:
    from pipelines.run.job import Job
    from pipelines.run.outcome import Outcome

STAGES = ("read", "decode", "encode", "generate", "write")
COMPARED = ("source", "row", "prompt", "pruned", "unpruned", "references", "jpeg", "kept", "num_tokens")
SHOWN_COMPARED = 12
THUMBNAIL = 224  # side of a card's image, in SVG units


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
    image = {name: getattr(compared, name) for name in COMPARED}
    return image | {"shade": pruned_area(image)}


def pruned_area(sample: dict[str, Any]) -> str:
    """SVG path that covers the thumbnail except the patches of the kept tokens; fill it by the even-odd rule.

    A merged token shows the patch that it grew from. A token without a place of its own (index -1) shows no patch. The
    path is empty if all tokens were kept, or if the tokens do not form a square.
    """
    side = math.isqrt(sample["num_tokens"])
    if side * side != sample["num_tokens"] or len(sample["kept"]) == sample["num_tokens"]:
        return ""
    cell = THUMBNAIL / side
    holes = (
        f"M{token % side * cell:g} {token // side * cell:g}h{cell:g}v{cell:g}h{-cell:g}z"
        for token in sample["kept"]
        if token >= 0
    )
    return f"M0 0H{THUMBNAIL}V{THUMBNAIL}H0z" + "".join(holes)
