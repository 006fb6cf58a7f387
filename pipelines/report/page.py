"""report.html: one self-contained page that says what a run did, cost and looked like; opens offline."""

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
THUMBNAIL = 224  # of the page, in pixels a side


def render_report(job: "Job", outcome: "Outcome", totals: Totals) -> str:
    """The page for one run and the output that it wrote to."""
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
        compared=[_compared(each) for each in gate.compared[:SHOWN_COMPARED]] if gate else [],
        totals=totals,
        num_rows=job.plan.num_rows,
        stages=[(stage, value, 100 * value / longest) for stage, value in seconds],
        reasons=[(reason, REASONS[reason], count) for reason, count in totals.reasons.most_common()],
        samples=[_sample(sample) for sample in outcome.samples],
    )


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A sampled image with a caption for each prompt."""
    captions = [done["caption"] for done in sample["captions"]]
    return {**sample, "said": list(zip(sample["prompts"], captions, strict=True)), "shade": pruned_area(sample)}


def _compared(each: Any) -> dict[str, Any]:
    """An image of the gate's sample, with its captions under both settings."""
    image = {name: getattr(each, name) for name in COMPARED}
    return image | {"shade": pruned_area(image)}


def pruned_area(sample: dict[str, Any]) -> str:
    """SVG path over the thumbnail, to be filled by the even-odd rule: everything but the kept tokens' patches.

    Merged tokens show the patch that they grew from; those of no one place show none.
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
