"""What a long job costs, from a short run: dollars at the rate once started, and the start-up apart."""

from collections.abc import Mapping


def steady_dollars(metrics: Mapping[str, float]) -> dict[str, float]:
    """Dollars of a run without its start-up: what a long job costs. Empty where the run has no price or no rate.

    `usd_per_million_images_steady` with `_low` and `_high` from the rate's interval, `usd_per_hour` of the cluster, and
    `usd_startup`, which a job pays once, however long it is.
    """
    rate, wall = metrics.get("images_per_second", 0.0), metrics.get("wall_seconds", 0.0)
    if "usd_total" not in metrics or rate <= 0 or wall <= 0:
        return {}
    per_hour = metrics["usd_total"] / wall * 3600
    startup = metrics.get("startup_seconds", max(0.0, wall - metrics.get("images_captioned", 0) / rate))
    ends = {"low": "images_per_second_high", "high": "images_per_second_low"}
    rates = {"": rate, **{f"_{end}": metrics[name] for end, name in ends.items() if name in metrics}}
    return {
        "usd_per_hour": per_hour,
        "usd_startup": per_hour * startup / 3600,
        "startup_seconds": startup,
        **{f"usd_per_million_images_steady{end}": 1e6 * per_hour / (3600 * each) for end, each in rates.items()},
    }
