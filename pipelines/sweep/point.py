"""One point of a sweep: its caption job on the connected cluster, and the record that says what came of it.

    <sweep>/points/<point>/               the job's own output
    <sweep>/points/<point>/point.json     the record, written last: status, reason, metrics, quality

A record is of one key, which changes with everything that changes captions or speed; only finished ones are skipped.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from pipelines.config.keys import Config
from pipelines.dollars import attribution
from pipelines.dollars.meter import make_tariff
from pipelines.errors import UserError
from pipelines.report.write import report_captions
from pipelines.run.cluster import check_room
from pipelines.run.job import Actors, Job, prepare
from pipelines.run.outcome import RECORD as RUN_RECORD
from pipelines.run.outcome import Outcome, read_cluster
from pipelines.run.resources import is_local
from pipelines.run.run import run_job
from pipelines.store import Store, make_store, read_json
from pipelines.sweep.grid import Point

logger = logging.getLogger(__name__)

RECORD = "point.json"
FINISHED, FAILED = "finished", "failed"
ENOUGH = 0.5  # share of a point's images that one run must have captioned for its speed to be the point's

Record = dict[str, Any]


def store_of(point: Point) -> Store:
    return make_store(point.config.output.path, endpoint_url=point.config.output.endpoint_url)


def read_record(point: Point) -> Record | None:
    """What an earlier sweep left of this very point, finished or failed."""
    record = read_json(store_of(point), RECORD)
    return record if record is not None and record.get("key") == point.key else None


def write_record(point: Point, record: Record) -> None:
    store_of(point).write(RECORD, json.dumps(record, indent=1).encode())


def run_here(point: Point, actors: Actors) -> Outcome:
    """Runs the point's job on the Ray that this process is connected to, or in this process.

    Raises:
        UserError: if something about the point has to be corrected, or its pools do not fit the cluster.
    """
    if not is_local(point.config):
        grows = bool(point.config.ray.address)
        check_room(point.config, point.checkpoint, ray.cluster_resources(), may_grow=grows)
    job = prepare(point.config, actors)
    if not can_be_measured(job):
        logger.info("%s: begun and interrupted, too little is left to measure its speed; starting it over", point.name)
        clear(job.output)
        job = prepare(point.config, actors)
    return run_job(job, conclude=report_captions)


def can_be_measured(job: Job) -> bool:
    """Whether what is left, or what the last run did, is enough of the point to stand for its speed."""
    left = job.plan.num_rows - job.plan.num_done
    if left:
        return left >= ENOUGH * job.plan.num_rows
    run = read_json(job.output, RUN_RECORD)
    return run is not None and measured_images(run) >= ENOUGH * job.plan.num_rows


def clear(output: Store) -> None:
    """Removes what a point's job has committed; what it cost stays on the books."""
    for folder in ("captions", "quarantine"):
        for name in output.list(folder):
            output.delete(f"{folder}/{name}")
    output.delete(RUN_RECORD)


def measured_images(run: Mapping[str, Any]) -> int:
    last = run.get("last_run", {})
    return int(last.get("images_captioned", 0) + last.get("images_quarantined", 0))


def finished_record(point: Point, quality: Mapping[str, Any]) -> Record:
    """The record of a point whose job is done.

    Raises:
        UserError: if the job's output does not say how it went.
    """
    run = read_json(store_of(point), RUN_RECORD)
    if run is None or not run.get("finished"):
        raise UserError(f"{point.config.output.path} holds no {RUN_RECORD} of a finished job")
    return {
        **_identity(point),
        "priced_by": tariff_digest(point.config),
        "status": FINISHED,
        "reason": "",
        "fingerprint": run["fingerprint"],
        "ran_on": run.get("cluster"),
        "images": measured_images(run),
        "pools": {"encode": point.config.encode.actors, "generate": point.config.generate.actors},
        "metrics": run["last_run"],
        "totals": run["totals"],
        "quality": dict(quality),
    }


def tariff_digest(config: Config) -> str:
    """Stands for everything that decides what a node costs."""
    return hashlib.sha256(repr(make_tariff(config.cost)).encode()).hexdigest()[:12]


def price_again(point: Point, record: Record) -> Record:
    """The record of a finished point by the prices of now.

    One price for the whole cluster makes new dollars of the point's seconds. With prices by node the old dollars stay,
    and `stale_price` says that they are not to be compared with others.
    """
    if record.get("priced_by") == tariff_digest(point.config):
        return record | {"stale_price": False}
    per_hour = point.config.cost.usd_per_hour
    if per_hour is None:
        return record | {"stale_price": True}
    metrics = attribution.price_again(record["metrics"], per_hour)
    tracked = {"tracked": None, "tracked_before": record.get("tracked")}  # its run in MLflow is written again
    return record | {"metrics": metrics, "priced_by": tariff_digest(point.config), "stale_price": False} | tracked


def machines_of(record: Record) -> str:
    """What a point ran on, in words, without the dashboard's address, which changes; empty if it is not known."""
    ran_on = record.get("ran_on")
    cluster = read_cluster(ran_on)
    return cluster.machines if cluster else ran_on or ""


def failed_record(point: Point, reason: str) -> Record:
    return {**_identity(point), "status": FAILED, "reason": reason}


def _identity(point: Point) -> Record:
    known = {"name": point.name, "key": point.key, "values": point.values, "group": point.group}
    return {**known, "ended": time.time()}


def unpruned_of(point: Point, points: Sequence[Point], records: Mapping[str, Record]) -> Point | None:
    """The finished unpruned point of the same group, on the same cluster and with the same batch where there is one."""
    done = (other for other in points if records.get(other.name, {}).get("status") == FINISHED)
    found = [other for other in done if other.is_unpruned and other.group == point.group]

    def alike(other: Point) -> int:
        return sum(other.values.get(axis) == point.values.get(axis) for axis in ("cluster", "batch"))

    return max(found, key=alike, default=None)
