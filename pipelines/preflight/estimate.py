"""What a run would take and cost, from a random sample that is captioned and thrown away.

    seconds(n) = fixed + n * seconds_per_image

`seconds_per_image` is the sample's `pace`; `fixed` is what is left of the sample's own time: start-up, first and last
unit on their way, shutting down.

The 90 % intervals are percentiles of DRAWS draws, each the product of
- which units were drawn: a bootstrap over the sample's units (ratio of sums; the bottleneck stage's seconds, captioned
  images, bytes), which also holds what differs between images;
- what a short sample leaves open about its own pace, log-normal as well;
- how the machine's speed drifts: log-normal, with the spread between BLOCKS stretches of the sample, at least DRIFT, or
  UNSEEN_DRIFT of a sample too short to show any;
- for `fixed`, measured once: log-normal, FIXED_SPREAD;
- for captioned images and their bytes, where no unit of the sample failed as a whole, that those which do may all have
  been missed (bad rows come in files): their share of what was not sampled is drawn from Beta(1/2, units + 1/2),
  Jeffreys' posterior after none in so many units. The interval reaches up to the sample's own share all the same.

What it does not know: other speeds than the connected cluster's, time to get nodes, and failures.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipelines.dollars.meter import Meter, check_instances, make_tariff
from pipelines.errors import JobFailedError, UserError
from pipelines.metrics.bootstrap import percentile_interval
from pipelines.preflight.sample import draw_units, run_sample
from pipelines.run.cluster import connected
from pipelines.run.job import Job
from pipelines.run.resources import actor_cpus, cluster_nodes, cluster_resources
from pipelines.run.tracked import start_tracker

logger = logging.getLogger(__name__)

LEVEL, DRAWS = 0.90, 2000
TRUST = 2 / 3  # in what the busiest stage took, against the arrivals of its units
Z90 = 1.645  # standard deviations on either side of a normal's 90 %
BLOCKS = 4  # stretches of the sample whose speeds are compared
UNITS_A_BLOCK = 3  # at least: units that arrive in pairs would look like another speed
STUDENT = {3: 2.920 / Z90, 4: 2.353 / Z90}  # by blocks: the interval of a spread that so few of them showed
DRIFT = 0.05  # least standard deviation of the logarithm of the speed
UNSEEN_DRIFT = 0.25  # of a sample too short for three blocks
FIXED_SPREAD = 0.15  # standard deviation of the logarithm of the fixed part

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A sample that was captioned: a row for each unit in order of arrival."""

    arrivals: np.ndarray  # seconds after the start
    rows: np.ndarray  # images of the unit, rejected ones too
    captioned: np.ndarray
    output_bytes: np.ndarray
    object_bytes: float  # of an object, whatever its rows
    seconds: dict[str, np.ndarray]  # of each stage
    parallel: dict[str, float]  # actors or tasks of each stage that work at a time
    elapsed: float  # of the whole sample run
    lost: int = 0  # units that did not come through


@dataclass(frozen=True, slots=True)
class Amount:
    """An expected value and its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class On:
    """The run on one kind of machine: `usd_per_hour` of all of it; dollars None without a price."""

    name: str
    usd_per_hour: float | None
    seconds: Amount
    usd: Amount | None
    speed: float | None = 1.0  # images/s relative to the connected cluster; None: not known, shown as if it were 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run would take; `fixed_seconds` of it whatever the number of images."""

    rows: int  # to do
    images: Amount
    output_bytes: Amount
    fixed_seconds: float
    seconds_per_image: float
    here: On
    instances: list[On] = field(default_factory=list)
    sample_images: int = 0
    sample_units: int = 0
    sample_lost: int = 0
    sample_usd: float | None = None
    cluster: str = ""

    def metrics(self) -> dict[str, float]:
        """Under their MLflow names, `estimate/...`."""
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


def run_estimate(job: Job) -> tuple[Estimate, str]:
    """Captions a sample on the connected cluster, or an embedded one, and scales it to what is left to do.

    Returns the estimate, and where it is tracked.

    Raises:
        UserError: if nothing is left to do, the cluster is out of reach, or no sampled unit came through.
    """
    config = job.config
    rows = job.plan.num_rows - job.plan.num_done
    if not rows:
        raise UserError(f"nothing to estimate: {job.output.path} is complete")
    spans = draw_units(job, config.estimate.images, config.estimate.seed)
    started = time.perf_counter()
    meter = Meter(make_tariff(config.cost), started)
    arrivals, summaries = [], []
    with connected(config, job.checkpoint) as cluster:
        joined, where = 0, str(cluster)
        meter.poll(cluster_nodes(config))
        logger.info("estimate: captioning %d images", sum(span.units[0].num_images for span in spans))
        try:
            for summary in run_sample(job, spans):
                arrivals.append(time.perf_counter() - started)
                summaries.append(summary)
                joined += len(meter.poll(cluster_nodes(config)))
        except JobFailedError as error:
            raise UserError(f"the sample could not be captioned: {error}") from error
        if joined:
            logger.warning("%d nodes joined during the sample: the start-up below holds the wait for them", joined)
            grown = cluster_resources(config)
            where += f", in the end {grown.get('CPU', 0):g} CPUs, {grown.get('GPU', 0):g} GPUs"
        parallel, usd_per_hour = _parallel(job), meter.usd_per_hour
    meter.stop()
    if not any(summary["images_captioned"] for summary in summaries):
        raise UserError(f"the sample could not be captioned: no image of its {len(spans)} units came through")
    measured = _measured(arrivals, summaries, parallel, meter.elapsed, len(spans) - len(summaries))
    instances = [(price.name, price.usd_per_hour, speed) for price, speed in check_instances(config)]
    units = len(job.plan.units)
    estimate = scale(measured, rows, units, usd_per_hour, instances, seed=config.estimate.seed)
    problems = "; ".join(meter.unpriced)
    estimate = replace(estimate, sample_usd=meter.usd, cluster=f"{where}{f'; {problems}' if problems else ''}")
    tracker = start_tracker(job, {"estimate": "true"})
    tracker.log(estimate.metrics(), 0)
    tracker.artifact("estimate.json", json.dumps(estimate.to_dict(), indent=1))
    return estimate, tracker.finish("FINISHED")


def scale(
    sample: Measured,
    rows: int,
    units: int,
    usd_per_hour: float | None,
    instances: list[tuple[str, float | None, float | None]],
    *,
    seed: int,
) -> Estimate:
    """The estimate for `rows` images in `units` objects, from the sample; `instances` as (name, $/hour, speed)."""
    rng = np.random.default_rng(seed)
    per_image, open_pace = pace(sample)
    fixed = max(0.0, sample.elapsed - per_image * sample.rows.sum())
    weights = rng.multinomial(len(sample.rows), np.full(len(sample.rows), 1 / len(sample.rows)), size=DRAWS)
    weights = np.vstack([np.ones(len(sample.rows)), weights])  # the first is the sample itself

    def ratio(values: np.ndarray) -> np.ndarray:
        return (weights @ values) / np.maximum(weights @ sample.rows, 1e-9)

    work = ratio(sample.seconds[bottleneck(sample)])
    drift = np.exp(rng.normal(0, np.hypot(max(DRIFT, spread(sample)), open_pace), DRAWS + 1))
    moves = np.exp(rng.normal(0, FIXED_SPREAD, DRAWS + 1))
    drift[0] = moves[0] = 1.0
    working = rows * per_image * work / max(work[0], 1e-12) * drift
    came = came_through(sample, rows, rng)
    images = rows * ratio(sample.captioned) * came
    grown = rows * ratio(np.maximum(0, sample.output_bytes - sample.object_bytes)) * came
    contents = grown + units * sample.object_bytes

    def on(name: str, price: float | None, speed: float | None) -> On:
        seconds = fixed * moves + working / (speed or 1.0)
        usd = None if price is None else _amount(seconds * price / 3600)
        return On(name, price, _amount(seconds), usd, speed)

    return Estimate(
        rows=rows,
        images=_amount(images),
        output_bytes=_amount(contents),
        fixed_seconds=fixed,
        seconds_per_image=per_image,
        here=on("this cluster", usd_per_hour, 1.0),
        instances=[on(*instance) for instance in instances],
        sample_images=int(sample.rows.sum()),
        sample_units=len(sample.rows),
        sample_lost=sample.lost,
    )


def came_through(sample: Measured, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of what is left of the images once units that fail as a whole, all missed by the sample, are taken away."""
    share = np.ones(DRAWS + 1)
    if sample.captioned.all():
        unseen = max(0.0, 1 - sample.rows.sum() / rows)
        share[1:] -= unseen * rng.beta(0.5, len(sample.rows) + 0.5, DRAWS)
    return share


def pace(sample: Measured) -> tuple[float, float]:
    """Seconds an image, and what the sample leaves open about them: a standard deviation of their logarithm.

    From the first arrival to the last, but no less than reading and decoding need: a short sample finds images decoded
    while the models load. Where the busiest stage worked for longer than units arrived, they had piled up while later
    stages were starting. The truth then is the latter, unless start-up slowed the stage itself, as on a machine of few
    CPUs: the estimate lies two thirds of the way to it, and the arrivals are the lower end of the 90 % interval. Of a
    sample of one unit, what its busiest stage took.
    """
    num_rows, after = sample.rows.sum(), sample.rows[1:].sum()

    def needs(stage: str) -> float:
        return sample.seconds[stage].sum() / sample.parallel[stage]

    busy = needs(bottleneck(sample)) / num_rows
    between = (sample.arrivals[-1] - sample.arrivals[0]) / after if after else busy
    between = max(between, (needs("read") + needs("decode")) / num_rows, 1e-9)
    ahead = max(1.0, busy / between)
    return float(between * ahead**TRUST), float(TRUST * np.log(ahead) / Z90)


def bottleneck(sample: Measured) -> str:
    """The stage that needs most time with the actors or tasks it has."""
    return max(sample.seconds, key=lambda stage: sample.seconds[stage].sum() / sample.parallel[stage])


def spread(sample: Measured) -> float:
    """Standard deviation of the logarithm of the time an image takes, between stretches of the sample, widened by what
    so few of them leave open."""
    count = min(BLOCKS, (len(sample.rows) - 1) // UNITS_A_BLOCK)
    if count < min(STUDENT):
        return UNSEEN_DRIFT
    edges = np.linspace(0, len(sample.rows) - 1, count + 1).astype(int)
    images = np.add.reduceat(sample.rows[1:], edges[:-1])
    times = np.diff(sample.arrivals[edges])
    return float(np.std(np.log(np.maximum(times, 1e-6) / images), ddof=1)) * STUDENT[count]


def _amount(draws: np.ndarray) -> Amount:
    """The first draw, which is the sample's own value, and the interval of the others, as far as it."""
    value, (low, high) = float(draws[0]), percentile_interval(draws[1:], LEVEL)
    return Amount(value, min(low, value), max(high, value))


def _parallel(job: Job) -> dict[str, float]:
    """How many actors or tasks of each stage the connected cluster lets work at a time."""
    config = job.config
    cpus = cluster_resources(config).get("CPU", 1.0)
    tasks = max(1.0, cpus - actor_cpus(config, job.checkpoint))
    actors = {"encode": float(config.encode.actors), "generate": float(config.generate.actors)}
    return {"read": tasks, "decode": tasks, "write": tasks} | actors


def _measured(
    arrivals: list[float], summaries: list[dict[str, Any]], parallel: dict[str, float], elapsed: float, lost: int
) -> Measured:
    def column(of: Any) -> np.ndarray:
        return np.array([of(summary) for summary in summaries], float)

    return Measured(
        arrivals=np.array(arrivals),
        rows=column(lambda s: s["images_captioned"] + s["images_quarantined"]),
        captioned=column(lambda s: s["images_captioned"]),
        output_bytes=column(lambda s: s["output_bytes"]),
        object_bytes=float(np.mean(column(lambda s: s["object_bytes"]))),
        seconds={stage: column(lambda s, stage=stage: s["seconds"].get(stage, 0.0)) for stage in parallel},
        parallel=parallel,
        elapsed=elapsed,
        lost=lost,
    )
