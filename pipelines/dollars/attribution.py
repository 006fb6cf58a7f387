"""Splits the dollars of a run by stage, and turns them into prices of images: plain arithmetic, for sweeps too."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Attribution:
    """The shares of a run's dollars: those that each stage and the gate used, the start-up, and the idle rest.

    During the start-up no stage can work yet. Stages that hold none of the scarce resource have no share: where GPUs
    are paid for, reading and decoding cost nothing extra.
    """

    stages: dict[str, float] = field(default_factory=dict)  # by name of the stage, and "gate"
    startup: float = 0.0

    @property
    def idle(self) -> float:
        """Share of the held capacity that no stage used, start-up included."""
        return max(0.0, 1.0 - sum(self.stages.values()))

    def dollars(self, usd: float) -> dict[str, float]:
        """`usd/<stage>`, `usd/startup` and `usd/idle` (idle after the start-up); they add up to `usd`."""
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
        capacity: seconds times units of the scarce resource that the cluster held.
        startup: share of the dollars that were spent before the first unit reached an actor, without the gate's.
        gate: share of the dollars that the gate's sample cost.
    """
    used = {stage: busy.get(stage, 0.0) * weight for stage, weight in weights.items() if weight}
    # Processes may outnumber Ray's logical CPUs, so that stages report more work than was held.
    total = max(capacity, sum(used.values()))
    if total <= 0:
        return Attribution()
    stages = {stage: seconds / total for stage, seconds in used.items()} | ({"gate": gate} if gate else {})
    return Attribution(stages, startup)


def price_images(
    usd: float, images: int, tokens: int, steady: tuple[float, float], rates: Mapping[str, float]
) -> dict[str, float]:
    """`price_run` and `price_steady` of one run; `steady` is (dollars, seconds) of the run without its start-up."""
    return price_run(usd, images, tokens) | price_steady(*steady, rates)


def price_again(metrics: Mapping[str, float], usd_per_hour: float) -> dict[str, float]:
    """The metrics of a finished run, priced again at `usd_per_hour` for its whole cluster: in proportion to seconds."""
    kept = {name: value for name, value in metrics.items() if not name.startswith(("usd", "tokens_per_usd"))}
    usd_per_second, images = usd_per_hour / 3600, kept["images_captioned"]
    tokens = round(kept["mean_caption_tokens"] * images)
    startup, wall = usd_per_second * kept["startup_seconds"], usd_per_second * kept["wall_seconds"]
    steady = wall - startup, kept["wall_seconds"] - kept["startup_seconds"]
    return kept | price_images(wall, int(images), tokens, steady, kept) | {"usd/startup": startup}


def price_run(usd: float, images: int, tokens: int) -> dict[str, float]:
    """`usd_total`; with images and dollars also `usd_per_image`, `usd_per_million_images` and `tokens_per_usd`
    (generated tokens)."""
    if not images or usd <= 0:
        return {"usd_total": usd}
    per_million = {"usd_per_image": usd / images, "usd_per_million_images": 1e6 * usd / images}
    return {"usd_total": usd, **per_million, "tokens_per_usd": tokens / usd}


def price_steady(usd: float, seconds: float, rates: Mapping[str, float]) -> dict[str, float]:
    """The price of a long job, whose start-up does not count; empty without a rate.

    Args:
        usd: dollars of a run without its start-up.
        seconds: seconds of that run without its start-up.
        rates: `images_per_second`, and the ends of its interval if there is one.

    Returns:
        `usd_per_hour`, and `usd_per_million_images_steady` with its `_low` and `_high` where the rate has an interval.
    """
    rate = rates.get("images_per_second", 0.0)
    if rate <= 0 or seconds <= 0:
        return {}
    per_hour = 3600 * usd / seconds
    ends = {"": "", "_low": "_high", "_high": "_low"}  # end of the price -> end of the rate: a fast run is a cheap one
    known = {end: rates[name] for end, opposite in ends.items() if (name := f"images_per_second{opposite}") in rates}
    steady = {f"usd_per_million_images_steady{end}": usd_per_million_images(per_hour, r) for end, r in known.items()}
    return {"usd_per_hour": per_hour, **steady}


def usd_per_million_images(usd_per_hour: float, images_per_second: float) -> float:
    """Price of a million images on a cluster of this hourly price and rate; infinite at a rate of 0."""
    return 1e6 * usd_per_hour / (3600 * images_per_second) if images_per_second > 0 else float("inf")
