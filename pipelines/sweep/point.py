"""Runs the caption job of one point on the connected cluster, and writes the point's record.

    <sweep>/points/<point>/               the job's own output
    <sweep>/points/<point>/point.json     the record, written last: status, reason, metrics, quality

A record holds the key of its point, which changes with everything that changes captions or speed. A sweep skips a point
only if its record has the same key and is finished.
"""

import hashlib
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
from pipelines.store import Store, make_store, read_json, write_json
from pipelines.sweep.grid import Point

logger = logging.getLogger(__name__)

RECORD = "point.json"
FINISHED, FAILED = "finished", "failed"
ENOUGH = 0.5  # share of a point's images that one run must caption, so that its speed stands for the point

Record = dict[str, Any]


def store_of(point: Point) -> Store:
    return make_store(point.config.output.path, endpoint_url=point.config.output.endpoint_url)


def read_record(point: Point) -> Record | None:
    """The record of an earlier run of the sweep, finished or failed; None if its key is another one."""
    record = read_json(store_of(point), RECORD)
    return record if record is not None and record.get("key") == point.key else None


def write_record(point: Point, record: Record) -> None:
    write_json(store_of(point), RECORD, record)


def run_here(point: Point, actors: Actors) -> Outcome:
    """Runs the point's job on the Ray that this process is connected to, or in this process.

    Raises:
        UserError: if the configuration of the point is wrong, or its pools do not fit the cluster.
    """
    if not is_local(point.config):
        grows = bool(point.config.ray.address)
        check_room(point.config, point.checkpoint, ray.cluster_resources(), may_grow=grows)
    job = prepare(point.config, actors)
    # An interrupted job resumes, but a few remaining images do not measure the speed of the point.
    if not can_be_measured(job):
        logger.info(
            "%s was interrupted and too few images are left to measure its speed: the point starts over", point.name
        )
        clear(job.output)
        job = prepare(point.config, actors)
    return run_job(job, conclude=report_captions)


def can_be_measured(job: Job) -> bool:
    """Whether enough images are left to measure the speed, or the finished last run captioned enough of them."""
    left = job.plan.num_rows - job.plan.num_done
    if left:
        return left >= ENOUGH * job.plan.num_rows
    run = read_json(job.output, RUN_RECORD)
    return run is not None and measured_images(run) >= ENOUGH * job.plan.num_rows


def clear(output: Store) -> None:
    """Removes the committed captions and quarantine of a point. The ledger stays: the dollars were spent."""
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
        UserError: if the output holds no run.json of a finished job.
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
    """Digest of everything that decides the price of a node. Records with the same digest have comparable dollars."""
    return hashlib.sha256(repr(make_tariff(config.cost)).encode()).hexdigest()[:12]


def price_again(point: Point, record: Record) -> Record:
    """The record of a finished point, with dollars by the current prices.

    With one price for the whole cluster, the dollars are computed again from the point's seconds. With prices by node
    this is not possible: the dollars stay, and `stale_price` says that they do not compare with those of other points.
    """
    if record.get("priced_by") == tariff_digest(point.config):
        return record | {"stale_price": False}
    per_hour = point.config.cost.usd_per_hour
    if per_hour is None:
        return record | {"stale_price": True}
    metrics = attribution.price_again(record["metrics"], per_hour)
    tracked = {"tracked": None, "tracked_before": record.get("tracked")}  # the sweep writes its MLflow run again
    return record | {"metrics": metrics, "priced_by": tariff_digest(point.config), "stale_price": False} | tracked


def machines_of(record: Record) -> str:
    """The machines of the point's cluster, in words, without the address of the dashboard; empty if not known."""
    ran_on = record.get("ran_on")
    cluster = read_cluster(ran_on)
    return cluster.machines if cluster else ran_on or ""


def failed_record(point: Point, reason: str) -> Record:
    return {**_identity(point), "status": FAILED, "reason": reason}


def _identity(point: Point) -> Record:
    identity = {"name": point.name, "key": point.key, "values": point.values, "group": point.group}
    return {**identity, "ended": time.time()}


def unpruned_of(point: Point, points: Sequence[Point], records: Mapping[str, Record]) -> Point | None:
    """The finished unpruned point of the same group; preferably of the same cluster and the same batch."""
    done = (other for other in points if records.get(other.name, {}).get("status") == FINISHED)
    found = [other for other in done if other.is_unpruned and other.group == point.group]

    def alike(other: Point) -> int:
        return sum(other.values.get(axis) == point.values.get(axis) for axis in ("cluster", "batch"))

    return max(found, key=alike, default=None)
