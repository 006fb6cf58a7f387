"""report.html: one self-contained page that says what a run did, cost and looked like; opens offline."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.config.load import to_yaml
from pipelines.output.schema import REASONS
from pipelines.output.totals import Totals

if TYPE_CHECKING:
    from pipelines.run.job import Job
    from pipelines.run.outcome import Outcome

HERE = Path(__file__).parent
STAGES = ("read", "decode", "encode", "generate", "write")
PACKAGES = ("otprune", "torch", "transformers", "ray", "mlflow")
COMPARED = ("source", "row", "prompt", "pruned", "unpruned", "references", "jpeg", "kept", "num_tokens")
SHOWN_COMPARED = 12
THUMBNAIL = 224  # of the page, in pixels a side


def render_report(job: "Job", outcome: "Outcome", totals: Totals) -> str:
    """The page for one run and the output that it wrote to."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    metrics = outcome.metrics
    dollars = [
        (name, metrics[f"usd/{name}"]) for name in (*STAGES, "gate", "startup", "idle") if f"usd/{name}" in metrics
    ]
    seconds = [(stage, totals.seconds[stage]) for stage in STAGES]
    longest = max((value for _, value in seconds), default=0) or 1
    return environment.get_template("captions.html.jinja").render(
        config=job.config,
        config_yaml=to_yaml(job.config),
        fingerprint=job.fingerprint,
        outcome=outcome,
        metrics=metrics,
        dollars=[(name, usd, 100 * usd / max(1e-12, metrics["usd_total"])) for name, usd in dollars],
        gate=(gate := outcome.gate),
        compared=[_compared(each) for each in gate.compared[:SHOWN_COMPARED]] if gate else [],
        packages=packages(),
        totals=totals,
        num_rows=job.plan.num_rows,
        stages=[(stage, value, 100 * value / longest) for stage, value in seconds],
        reasons=[(reason, REASONS[reason], count) for reason, count in totals.reasons.most_common()],
        samples=[_sample(sample) for sample in outcome.samples],
    )


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "kept_share": len(sample["kept"]) / sample["num_tokens"], "shade": pruned_area(sample)}


def _compared(each: Any) -> dict[str, Any]:
    """An image of the gate's sample, with its captions under both settings."""
    image = {name: getattr(each, name) for name in COMPARED}
    return image | {"shade": pruned_area(image)}


def packages() -> dict[str, str]:
    """Python and the packages that decide speed, with their versions."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


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
