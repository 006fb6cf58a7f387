"""A finished point as a buyer sees it: its cost and its quality, each with its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from otprune.methods import UNPRUNED
from pipelines.sweep.point import FINISHED, Record

Interval = tuple[float, float, float]  # value and the ends of its 95 % interval

STEADY_USD = "usd_per_million_images_steady"  # a metric of a finished point, also with `_low` and `_high`


@dataclass(frozen=True, slots=True)
class Setting:
    """The cost and quality of a finished point. `cost` is in dollars per million images, or in hours without prices."""

    name: str
    label: str
    values: dict[str, Any]
    cost: Interval
    rate: float  # images a second
    quality: Interval | None  # as a share of the unpruned model's quality
    record: Record = field(repr=False)

    @property
    def is_unpruned(self) -> bool:
        return self.values["method"] == UNPRUNED

    @property
    def quality_value(self) -> float:
        """The quality without its interval: 1 for the unpruned model, 0 if it is not known."""
        return self.quality[0] if self.quality else 1.0 if self.is_unpruned else 0.0

    @property
    def full_name(self) -> str:
        return f"{self.label} ({self.values['cluster']})"


def settings_of(records: Sequence[Record]) -> list[Setting]:
    """The settings of the finished points, cheapest first."""
    priced = has_prices(records)
    settings = [
        Setting(
            record["name"],
            label_of(record["values"]),
            record["values"],
            _cost(record["metrics"], priced),
            record["metrics"].get("images_per_second", 0.0),
            tuple(quality) if (quality := (record.get("quality") or {}).get("relative")) else None,  # pyright: ignore
            record,
        )
        for record in records
        if record["status"] == FINISHED
    ]
    return sorted(settings, key=lambda setting: setting.cost[0])


def has_prices(records: Sequence[Record]) -> bool:
    """Whether every finished point has its dollars by the current prices. If not, points are compared by hours."""
    done = [record for record in records if record["status"] == FINISHED]
    return bool(done) and all(STEADY_USD in record["metrics"] and not record.get("stale_price") for record in done)


def label_of(values: dict[str, Any]) -> str:
    """Method and retention of a setting, without its cluster: `otprune at 10 %`."""
    if values["method"] == UNPRUNED:
        return "unpruned"
    return f"{values['method']} at {100 * values['retention']:g} %"


def similar(
    setting: Setting, settings: Sequence[Setting], method: str, retention: float | None = None
) -> Setting | None:
    """The setting that differs from `setting` only in its method, and in its retention if one is given.

    The method `none` keeps all tokens, so its setting matches any retention.
    """
    wanted = setting.values | {"method": method} | ({} if retention is None else {"retention": retention})
    if method == UNPRUNED:
        wanted.pop("retention")
    return next((other for other in settings if wanted.items() <= other.values.items()), None)


def percent(ends: Interval | None) -> str:
    """`97 % (95 to 99)`."""
    return "unknown" if ends is None else f"{100 * ends[0]:.0f} % ({100 * ends[1]:.0f} to {100 * ends[2]:.0f})"


def _cost(metrics: dict[str, float], priced: bool) -> Interval:
    """Dollars per million images at steady speed; hours per million images if not `priced`."""
    if priced:
        value = metrics[STEADY_USD]
        return value, metrics.get(f"{STEADY_USD}_low", value), metrics.get(f"{STEADY_USD}_high", value)
    rate = metrics.get("images_per_second", 0.0)
    # The highest rate gives the lowest number of hours: the ends of the interval swap.
    ends = metrics.get("images_per_second_high", rate), metrics.get("images_per_second_low", rate)
    value, low, high = (1e6 / 3600 / max(images_per_second, 1e-9) for images_per_second in (rate, *ends))
    return value, low, high
