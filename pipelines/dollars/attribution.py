"""Where the dollars of a run went: plain arithmetic, for sweeps as well."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Attribution:
    """How a run's dollars divide, in shares: what each stage and the gate used, the start-up, and what is left, idle.

    The start-up is the time in which nothing could be busy yet. Stages of the other resource have no share: where
    GPUs are paid for, reading and decoding ride along.
    """

    stages: dict[str, float] = field(default_factory=dict)
    startup: float = 0.0

    @property
    def idle(self) -> float:
        """Share of the capacity that was held for nothing, start-up included."""
        return max(0.0, 1.0 - sum(self.stages.values()))

    def dollars(self, usd: float) -> dict[str, float]:
        """`usd/<stage>`, `usd/startup` and `usd/idle`; they add up to `usd`."""
        startup = min(self.startup, self.idle)
        parts = {**self.stages, "startup": startup, "idle": self.idle - startup}
        return {f"usd/{name}": usd * share for name, share in parts.items()}


def attribute(
    busy: Mapping[str, float], weights: Mapping[str, float], capacity: float, startup: float, gate: float = 0.0
) -> Attribution:
    """The attribution of a run.

    Args:
        busy: seconds of work of each stage, summed over actors or tasks.
        weights: units of the scarce resource that one actor or task of the stage holds.
        capacity: unit-seconds held; more than that cannot have been used (logical CPUs may be fewer than processes).
        startup: share of the dollars that were spent before the first unit could be worked on.
        gate: share of the dollars that the gate's sample cost.
    """
    used = {stage: busy.get(stage, 0.0) * weight for stage, weight in weights.items() if weight}
    whole = max(capacity, sum(used.values()))
    if whole <= 0:
        return Attribution()
    stages = {stage: seconds / whole for stage, seconds in used.items()} | ({"gate": gate} if gate else {})
    return Attribution(stages, startup)


def price_images(
    usd: float, images: int, tokens: int, steady: tuple[float, float], rates: Mapping[str, float]
) -> dict[str, float]:
    """What the images of a run cost, and what a long job would cost; `steady` holds the dollars and the seconds of the
    run without its start-up."""
    return price_run(usd, images, tokens) | price_steady(*steady, rates)


def price_again(metrics: Mapping[str, float], usd_per_hour: float) -> dict[str, float]:
    """The metrics of a run that is over, with dollars by one price of its whole cluster: in proportion to seconds."""
    kept = {name: value for name, value in metrics.items() if not name.startswith(("usd", "tokens_per_usd"))}
    usd_per_second, images = usd_per_hour / 3600, kept["images_captioned"]
    tokens = round(kept["mean_caption_tokens"] * images)
    startup, wall = usd_per_second * kept["startup_seconds"], usd_per_second * kept["wall_seconds"]
    steady = wall - startup, kept["wall_seconds"] - kept["startup_seconds"]
    return kept | price_images(wall, int(images), tokens, steady, kept) | {"usd/startup": startup}


def price_run(usd: float, images: int, tokens: int) -> dict[str, float]:
    """`usd_total`, and where there are images `usd_per_image`, `usd_per_million_images` and `tokens_per_usd`
    (generated tokens)."""
    if not images or usd <= 0:
        return {"usd_total": usd}
    per_million = {"usd_per_image": usd / images, "usd_per_million_images": 1e6 * usd / images}
    return {"usd_total": usd, **per_million, "tokens_per_usd": tokens / usd}


def price_steady(usd: float, seconds: float, rates: Mapping[str, float]) -> dict[str, float]:
    """What a long job costs, from the dollars and seconds of a run without its start-up; empty without a rate.

    `usd_per_hour`, and `usd_per_million_images_steady` at the rate `images_per_second`, with `_low` and `_high` from
    the ends of the rate's interval where it has one.
    """
    rate = rates.get("images_per_second", 0.0)
    if rate <= 0 or seconds <= 0:
        return {}
    per_hour = 3600 * usd / seconds
    ends = {"": "", "_low": "_high", "_high": "_low"}  # of dollars, of the rate
    known = {end: rates[name] for end, of in ends.items() if (name := f"images_per_second{of}") in rates}
    steady = {f"usd_per_million_images_steady{end}": usd_per_million_images(per_hour, r) for end, r in known.items()}
    return {"usd_per_hour": per_hour, **steady}


def usd_per_million_images(usd_per_hour: float, images_per_second: float) -> float:
    """Of a cluster that captions at this rate; infinite at a rate of 0."""
    return 1e6 * usd_per_hour / (3600 * images_per_second) if images_per_second > 0 else float("inf")
