"""Estimates time and dollars of a run from a random sample, which is captioned and thrown away."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.dollars.meter import Meter, check_instances, make_tariff
from pipelines.errors import JobFailedError, UserError
from pipelines.preflight.extrapolate import Estimate, MeasuredSample, scale
from pipelines.preflight.sample import draw_units, run_sample
from pipelines.run.cluster import connected
from pipelines.run.job import Job
from pipelines.run.resources import actor_cpus, cluster_nodes, cluster_resources
from pipelines.run.tracked import start_tracker

logger = logging.getLogger(__name__)


def run_estimate(job: Job) -> tuple[Estimate, str]:
    """Captions a sample on the connected cluster, or an embedded one, and scales it to the rows that are left to do.

    Returns:
        The estimate, and where MLflow has it.

    Raises:
        UserError: if nothing is left to do, the cluster is out of reach, or no sampled unit was captioned.
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
        joined, cluster_text = 0, str(cluster)
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
            logger.warning("%d nodes joined during the sample: the start-up below includes the wait for them", joined)
            grown = cluster_resources(config)
            cluster_text += f", in the end {grown.get('CPU', 0):g} CPUs, {grown.get('GPU', 0):g} GPUs"
        parallel, usd_per_hour = _parallel(job), meter.usd_per_hour  # while the cluster is still connected
    meter.stop()
    if not any(summary["images_captioned"] for summary in summaries):
        raise UserError(f"the sample could not be captioned: no image of its {len(spans)} units was captioned")
    measured = _measured(arrivals, summaries, parallel, meter.elapsed, len(spans) - len(summaries))
    instances = [(price.name, price.usd_per_hour, speed) for price, speed in check_instances(config)]
    estimate = scale(measured, rows, len(job.plan.units), usd_per_hour, instances, seed=config.estimate.seed)
    problems = "; ".join(meter.unpriced)
    estimate = replace(estimate, sample_usd=meter.usd, cluster=f"{cluster_text}{f'; {problems}' if problems else ''}")
    return estimate, _track(job, estimate)


def _track(job: Job, estimate: Estimate) -> str:
    """Writes the estimate to a run of MLflow, and returns where that is."""
    tracker = start_tracker(job, {"estimate": "true"})
    tracker.log(estimate.metrics(), 0)
    tracker.artifact("estimate.json", json.dumps(estimate.to_dict(), indent=1))
    return tracker.finish("FINISHED")


def _parallel(job: Job) -> dict[str, float]:
    """Stage -> actors or tasks that work at a time on the connected cluster."""
    config = job.config
    cpus = cluster_resources(config).get("CPU", 1.0)
    tasks = max(1.0, cpus - actor_cpus(config, job.checkpoint))
    actors = {"encode": float(config.encode.actors), "generate": float(config.generate.actors)}
    return {"read": tasks, "decode": tasks, "write": tasks} | actors


def _measured(
    arrivals: list[float], summaries: list[dict[str, Any]], parallel: dict[str, float], elapsed: float, lost: int
) -> MeasuredSample:
    def column(value_of: Callable[[dict[str, Any]], float]) -> np.ndarray:
        return np.array([value_of(summary) for summary in summaries], float)

    return MeasuredSample(
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
