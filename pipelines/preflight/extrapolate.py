"""Scales a captioned sample to the images that are left to do, with 90 % intervals. Pure arithmetic.

    seconds(n) = fixed + n * seconds_per_image

`seconds_per_image` is the `pace` of the sample. `fixed` is the rest of the sample's own time: the start-up, the first
and the last unit on their way through the stages, and the shutdown.

The intervals are percentiles of DRAWS draws. Each draw is the product of
- a bootstrap over the units of the sample (ratio of sums; of the bottleneck stage's seconds, of captioned images, and
  of bytes), which also covers the differences between images;
- the uncertainty of the pace of a short sample: log-normal;
- the drift of the machine's speed: log-normal, with the spread between BLOCKS stretches of the sample, at least DRIFT,
  or UNSEEN_DRIFT if the sample is too short to show any drift;
- for `fixed`, which is measured once: log-normal, FIXED_SPREAD;
- for captioned images and their bytes, if no unit of the sample failed as a whole: the chance that the sample missed
  all such units (bad rows come in files). Their share of the images outside the sample is drawn from
  Beta(1/2, units + 1/2), Jeffreys' posterior after no failure in so many units. The interval still reaches up to the
  sample's own share.

The intervals do not cover machines of another speed than the connected cluster, the wait for nodes, and failures.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.metrics.bootstrap import percentile_interval

LEVEL, DRAWS = 0.90, 2000
TRUST = 2 / 3  # weight of the busiest stage's work against the arrivals of its units, in the logarithm of the pace
Z90 = 1.645  # standard deviations on either side of the mean that hold 90 % of a normal distribution
BLOCKS = 4  # stretches of the sample whose speeds are compared
UNITS_A_BLOCK = 3  # least units of a stretch: with fewer, units that arrive in pairs would look like a change of speed
STUDENT = {3: 2.920 / Z90, 4: 2.353 / Z90}  # stretches -> factor that widens a spread estimated from so few of them
DRIFT = 0.05  # least standard deviation of the logarithm of the speed
UNSEEN_DRIFT = 0.25  # the same for a sample too short for three stretches
FIXED_SPREAD = 0.15  # standard deviation of the logarithm of the fixed part


@dataclass(frozen=True, slots=True)
class MeasuredSample:
    """A captioned sample. The arrays have one entry for each unit, in order of arrival."""

    arrivals: np.ndarray  # seconds after the start
    rows: np.ndarray  # images of the unit, rejected images included
    captioned: np.ndarray  # captioned images of the unit
    output_bytes: np.ndarray  # of all objects of the unit
    object_bytes: float  # of an object without rows
    seconds: dict[str, np.ndarray]  # stage -> seconds of work on the unit
    parallel: dict[str, float]  # stage -> actors or tasks that work at a time
    elapsed: float  # seconds of the whole sample run
    lost: int = 0  # units that failed, or whose process died


@dataclass(frozen=True, slots=True)
class Amount:
    """An expected value and its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MachineEstimate:
    """Time and dollars of the run on one kind of machine."""

    name: str
    usd_per_hour: float | None  # of all its nodes; None without a price
    seconds: Amount
    usd: Amount | None  # None without a price
    speed: float | None = 1.0  # images/s relative to the connected cluster; None: unknown, computed as 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time, dollars and output of the run."""

    rows: int  # to do
    images: Amount  # captioned
    output_bytes: Amount
    fixed_seconds: float  # of the run, whatever the number of images
    seconds_per_image: float
    here: MachineEstimate
    instances: list[MachineEstimate] = field(default_factory=list)
    sample_images: int = 0
    sample_units: int = 0
    sample_lost: int = 0
    sample_usd: float | None = None
    cluster: str = ""

    def metrics(self) -> dict[str, float]:
        """The numbers of the estimate under their MLflow names, `estimate/...`."""
        amounts = {"images": self.images, "output_bytes": self.output_bytes, "seconds": self.here.seconds}
        amounts |= {"usd": self.here.usd} if self.here.usd else {}
        metrics = {}
        for name, amount in amounts.items():
            metrics |= {f"estimate/{name}": amount.value}
            metrics |= {f"estimate/{name}_low": amount.low, f"estimate/{name}_high": amount.high}
        metrics["estimate/fixed_seconds"] = self.fixed_seconds
        metrics["estimate/images_per_second"] = 1 / self.seconds_per_image
        return metrics | ({} if self.sample_usd is None else {"estimate/sample_usd": self.sample_usd})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scale(
    sample: MeasuredSample,
    rows: int,
    units: int,
    usd_per_hour: float | None,
    instances: list[tuple[str, float | None, float | None]],
    *,
    seed: int,
) -> Estimate:
    """The estimate for `rows` images in `units` objects.

    Args:
        usd_per_hour: of the connected cluster; None without a price.
        instances: (name, dollars an hour, relative speed) of other machines; None where unknown.
    """
    rng = np.random.default_rng(seed)
    per_image, open_pace = pace(sample)
    fixed = max(0.0, sample.elapsed - per_image * sample.rows.sum())
    # Row 0 of `weights`, and entry 0 of everything drawn below, is the sample itself: it gives the expected values.
    weights = rng.multinomial(len(sample.rows), np.full(len(sample.rows), 1 / len(sample.rows)), size=DRAWS)
    weights = np.vstack([np.ones(len(sample.rows)), weights])

    def ratio(values: np.ndarray) -> np.ndarray:
        return (weights @ values) / np.maximum(weights @ sample.rows, 1e-9)

    work = ratio(sample.seconds[bottleneck(sample)])
    drift = np.exp(rng.normal(0, np.hypot(max(DRIFT, spread(sample)), open_pace), DRAWS + 1))
    fixed_factors = np.exp(rng.normal(0, FIXED_SPREAD, DRAWS + 1))
    drift[0] = fixed_factors[0] = 1.0
    working_seconds = rows * per_image * work / max(work[0], 1e-12) * drift
    surviving = draw_surviving_share(sample, rows, rng)
    images = rows * ratio(sample.captioned) * surviving
    row_bytes = rows * ratio(np.maximum(0, sample.output_bytes - sample.object_bytes)) * surviving
    output_bytes = row_bytes + units * sample.object_bytes

    def on_machine(name: str, price: float | None, speed: float | None) -> MachineEstimate:
        return _on_machine(name, price, speed, fixed * fixed_factors + working_seconds / (speed or 1.0))

    return Estimate(
        rows=rows,
        images=_amount(images),
        output_bytes=_amount(output_bytes),
        fixed_seconds=fixed,
        seconds_per_image=per_image,
        here=on_machine("this cluster", usd_per_hour, 1.0),
        instances=[on_machine(*instance) for instance in instances],
        sample_images=int(sample.rows.sum()),
        sample_units=len(sample.rows),
        sample_lost=sample.lost,
    )


def draw_surviving_share(sample: MeasuredSample, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draws (DRAWS + 1) of the share of images outside units that fail as a whole and that the sample missed.

    The first is 1, the value of the sample itself. All are 1 if the sample holds such a unit.
    """
    share = np.ones(DRAWS + 1)
    if sample.captioned.all():
        unseen = max(0.0, 1 - sample.rows.sum() / rows)
        share[1:] -= unseen * rng.beta(0.5, len(sample.rows) + 0.5, DRAWS)
    return share


def pace(sample: MeasuredSample) -> tuple[float, float]:
    """(seconds an image, standard deviation of their logarithm that a short sample leaves open).

    The pace is the time from the first arrival to the last, but no less than reading and decoding need: a short sample
    finds images that were decoded while the models loaded.

    The busiest stage may have worked for longer than its units took to arrive. Then units had piled up while later
    stages were starting, and the true pace is that of the busiest stage, unless the start-up slowed the stage itself,
    as on a machine of few CPUs. The estimate lies two thirds of the way to the busiest stage (TRUST), and the arrivals
    are the lower end of the 90 % interval.

    The pace of a sample of one unit is the work of its busiest stage.
    """
    num_rows, rows_after_first = sample.rows.sum(), sample.rows[1:].sum()

    def needed_seconds(stage: str) -> float:
        return sample.seconds[stage].sum() / sample.parallel[stage]

    busy = needed_seconds(bottleneck(sample)) / num_rows
    between = (sample.arrivals[-1] - sample.arrivals[0]) / rows_after_first if rows_after_first else busy
    between = max(between, (needed_seconds("read") + needed_seconds("decode")) / num_rows, 1e-9)
    ahead = max(1.0, busy / between)
    return float(between * ahead**TRUST), float(TRUST * np.log(ahead) / Z90)


def bottleneck(sample: MeasuredSample) -> str:
    """The stage that takes the longest with its number of actors or tasks."""
    return max(sample.seconds, key=lambda stage: sample.seconds[stage].sum() / sample.parallel[stage])


def spread(sample: MeasuredSample) -> float:
    """Standard deviation, between stretches of the sample, of the logarithm of the seconds an image.

    STUDENT widens it, because three or four stretches show little of the spread. UNSEEN_DRIFT if there are fewer.
    """
    count = min(BLOCKS, (len(sample.rows) - 1) // UNITS_A_BLOCK)
    if count < min(STUDENT):
        return UNSEEN_DRIFT
    edges = np.linspace(0, len(sample.rows) - 1, count + 1).astype(int)
    images = np.add.reduceat(sample.rows[1:], edges[:-1])  # a stretch begins at an arrival and ends at a later one
    times = np.diff(sample.arrivals[edges])
    return float(np.std(np.log(np.maximum(times, 1e-6) / images), ddof=1)) * STUDENT[count]


def _on_machine(name: str, price: float | None, speed: float | None, seconds: np.ndarray) -> MachineEstimate:
    usd = None if price is None else _amount(seconds * price / 3600)
    return MachineEstimate(name, price, _amount(seconds), usd, speed)


def _amount(draws: np.ndarray) -> Amount:
    """The first draw as the value, with the interval of the other draws, widened to hold the value."""
    value, (low, high) = float(draws[0]), percentile_interval(draws[1:], LEVEL)
    return Amount(value, min(low, value), max(high, value))
