"""Expands the grid of a sweep into points. A point is the whole configuration of one caption job.

An axis is `method`, `retention`, `engine`, `batch`, `cluster` or any key of the caption job, and holds a list of
values. A method with settings is a mapping, such as `{fastv: {layer: 2}}`. A cluster is a mapping of keys (pool sizes,
accelerators, prices ...). It may have a `name`, and it has the `address` of a Ray dashboard if its points are submitted
to another cluster. The method `none` keeps every token, so it makes one point for all retentions. It runs first,
because the quality of the other points is measured against it.
"""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from otprune.methods import BASELINES, UNPRUNED
from otprune.models import Checkpoint
from pipelines.config.keys import Config
from pipelines.config.load import read_yaml, with_values
from pipelines.errors import UserError
from pipelines.output.fingerprint import fingerprint
from pipelines.run.describe import describe
from pipelines.run.job import check_model, check_pruning, inside_model
from pipelines.secrets import deciding
from pipelines.store import make_store
from pipelines.sweep.config import SweepConfig

AXES = {
    "method": "prune.method",
    "retention": "prune.retention",
    "engine": "engine.name",
    "batch": "generate.batch_size",
}
ALWAYS = (UNPRUNED, *BASELINES)
POINTS = "points"  # subfolder of the sweep's output
CAPTIONS_ALIKE = ("method", "retention", "batch", "cluster")  # axes that do not change unpruned captions
NOT_SPEED = ("engine.timeout_seconds", "engine.max_restarts")  # a point that finished was not affected by them
NOT_OF_POINTS = (  # keys that cannot be an axis: they belong to the sweep, or change no result
    "input.path",
    "output.path",
    "output.on_mismatch",
    "ray.address",
    "mlflow.",
    "run.",
    "budget.",
    "gate.",
    "quality.",
)


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of axis values, and the configuration of its caption job."""

    name: str  # name of the folder and of the MLflow run
    values: dict[str, Any]  # axis -> value; for the axis cluster, the name of the cluster
    config: Config
    checkpoint: Checkpoint
    address: str | None  # dashboard of the cluster that the job is submitted to; None: the connected cluster
    key: str  # digest of everything that changes captions or speed

    @property
    def group(self) -> str:
        """Points of one group have the same unpruned captions."""
        return json.dumps({axis: value for axis, value in self.values.items() if axis not in CAPTIONS_ALIKE})

    @property
    def is_unpruned(self) -> bool:
        return self.values["method"] == UNPRUNED


def make_points(config: SweepConfig) -> list[Point]:
    """All points, in the order in which they run.

    Raises:
        UserError: for anything in the grid that the user has to correct.
    """
    axes = read_axes(config)
    methods, retentions = axes.pop("method"), axes.pop("retention")
    own = dict(map(_read_method, methods))
    if len(own) < len(methods):
        raise UserError("sweep.grid must hold every value of an axis once")
    settings = [(UNPRUNED, 1.0)] * (UNPRUNED in own) + [(m, r) for m in own if m != UNPRUNED for r in retentions]
    # Only axes with several values are in the names of points, which stay short.
    varied = {name for name, values in axes.items() if len(values) > 1}
    clusters = axes.pop("cluster")
    points = []
    for cluster in clusters:
        for method, retention in settings:
            for rest in itertools.product(*axes.values()):
                values = {"method": method, "retention": retention, **dict(zip(axes, rest, strict=True))}
                points.append(_make_point(config, values, own[method], cluster, varied))
    if len({point.name for point in points}) < len(points):
        raise UserError("sweep.grid must hold every value of an axis once")
    return points


def read_axes(config: SweepConfig) -> dict[str, list[Any]]:
    """Axis -> its values. `method`, `retention` and `cluster` are always axes; the configuration sets their default.

    Raises:
        UserError: if an axis is not a known key, or does not hold a list of values.
    """
    grid = config.sweep.grid
    if isinstance(grid, str):
        grid = read_yaml(Path(grid), "sweep.grid")
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"sweep.grid must map axes to lists of values, got {grid!r}")
    known = Config().dotted()
    for axis, values in grid.items():
        if axis != "cluster" and axis not in AXES and (axis not in known or axis.startswith(NOT_OF_POINTS)):
            raise UserError(f"sweep.grid: an axis must be {', '.join(AXES)}, cluster or a key of points, got {axis!r}")
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep.grid: {axis} must be a list of values, got {values!r}")
    axes: dict[str, list[Any]] = {
        "method": list(grid.get("method", [config.prune.method])),
        "retention": [_share(value) for value in grid.get("retention") or [_default_retention(config)]],
        **{axis: list(values) for axis, values in grid.items() if axis not in ("method", "retention", "cluster")},
        "cluster": [_read_cluster(config, cluster) for cluster in grid.get("cluster", [{}])],
    }
    if config.sweep.baselines:
        axes["method"] += [method for method in ALWAYS if method not in axes["method"]]
    names = [cluster["name"] for cluster in axes["cluster"]]
    if len(set(names)) < len(names):
        raise UserError(f"sweep.grid: clusters must have different names, got {', '.join(names)}")
    return axes


def _default_retention(config: SweepConfig) -> float:
    """The retention of the configuration, or that of its model's family."""
    if config.prune.retention is not None:
        return config.prune.retention
    return check_model(config)[0].prune.share


def _read_method(method: Any) -> tuple[str, dict[str, Any]]:
    """A method of the grid as (name, settings)."""
    if isinstance(method, str):
        return method, {}
    if isinstance(method, dict) and len(method) == 1 and all(isinstance(value, dict) for value in method.values()):
        return next((str(name), settings) for name, settings in method.items())
    raise UserError(f"sweep.grid: a method must be its name, or a name with a mapping of settings, got {method!r}")


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise UserError(f"sweep.grid: retention must be above 0 and at most 1, got {value!r}")
    return float(value)


def _read_cluster(config: SweepConfig, cluster: Any) -> dict[str, Any]:
    """A cluster of the grid as `{"name": ..., "address": ..., "values": {key: value}}`.

    A cluster without a name is named by its pools: `e1g2-A100` has 1 encode actor and 2 generate actors on A100s.
    """
    if not isinstance(cluster, dict):
        raise UserError(f"sweep.grid: a cluster must be a mapping of keys, got {cluster!r}")
    values = {str(key): value for key, value in cluster.items() if key not in ("name", "address")}
    allowed = ("encode.", "generate.", "cost.", "ray.", "unit.")
    for key in values:
        if key == "ray.address" or not key.startswith(allowed):
            raise UserError(
                "sweep.grid: a cluster must hold name, address (of a Ray dashboard), and keys of encode, generate, "
                f"unit, cost and ray; got {key!r}"
            )
    pools = with_values(config, values)
    kinds = [pool.accelerator for pool in (pools.encode, pools.generate) if pool.accelerator]
    name = f"e{pools.encode.actors}g{pools.generate.actors}" + "".join(f"-{kind}" for kind in dict.fromkeys(kinds))
    address = cluster.get("address")
    if address and "name" not in cluster:
        name = f"{_plain(address.rpartition('//')[2])}-{name}"
    return {"name": _plain(str(cluster.get("name", name))), "address": address, "values": values}


def _make_point(
    config: SweepConfig, values: dict[str, Any], own: dict[str, Any], cluster: dict[str, Any], varied: set[str]
) -> Point:
    sections: dict[str, Any] = {part.name: getattr(config, part.name) for part in fields(Config)}
    # Settings belong to one method: a point of another method must not inherit them.
    plain = replace(Config(**sections), prune=replace(config.prune, settings={}))
    keys = {AXES.get(axis, axis): value for axis, value in values.items()} | cluster["values"]
    keys["prune.settings"] = own or (config.prune.settings if values["method"] == config.prune.method else {})
    job = with_values(plain, keys | {"mlflow.enabled": False, "output.on_mismatch": "refuse"})
    job, checkpoint = check_model(job)
    pruning = check_pruning(job, checkpoint)
    # Everything that changes captions or speed. A record with another digest of it is not this point's.
    decides = {
        "fingerprint": fingerprint(describe(job, checkpoint, pruning if inside_model(job) else None)),
        "input.path": make_store(job.input.path).path,
        "address": cluster["address"],
        **{
            name: value
            for name, value in job.dotted().items()
            if name in ("input.limit", "ray.address", "unit.images")
            or (name.startswith(("encode.", "generate.", "engine.")) and name not in NOT_SPEED)
        },
    }
    key = hashlib.sha256(json.dumps(deciding(decides), sort_keys=True, default=str).encode()).hexdigest()[:8]
    shown = {**values, "cluster": cluster["name"]}
    parts = [UNPRUNED if values["method"] == UNPRUNED else f"{values['method']}-{values['retention']:g}"]
    parts += [f"{axis.rpartition('.')[2]}-{shown[axis]}" for axis in shown if axis in varied and axis != "cluster"]
    parts += [cluster["name"]] if "cluster" in varied else []
    name = "-".join(_plain(part) for part in [*parts, key])
    output = "/".join((make_store(config.output.path).address_with_user, POINTS, name))
    job = replace(job, output=replace(job.output, path=output))
    return Point(name, shown, job, checkpoint, cluster["address"], key)


def _plain(text: str) -> str:
    """The text as a part of a folder's name."""
    return re.sub(r"[^\w.+=]+", "-", text).strip("-")[:60]
