"""The prices of nodes: rows of dated price files, and the row that fits a node of the cluster.

The label `instance-type` identifies a node, else the type and number of its accelerators. If no row fits, or several
rows with different prices do, the node has no price and a message says why: no node is ever priced by a guess.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from pipelines.config.load import REPOSITORY
from pipelines.errors import UserError

INSTANCE_LABELS = ("instance-type", "node.kubernetes.io/instance-type")
MARKET_LABEL, REGION_LABEL = "ray.io/market-type", "ray.io/availability-region"
ACCELERATOR_LABEL, ACCELERATOR_RESOURCE = "ray.io/accelerator-type", "accelerator_type:"


@dataclass(frozen=True, slots=True)
class Price:
    """One row: an instance, its GPUs and its USD per hour; `date` and `source` tell the origin of the price."""

    instance: str
    usd_per_hour: float | None
    spot_usd_per_hour: float | None = None
    gpu: str = ""
    count: float = 0
    per_gpu: bool = False  # the price is of one GPU (count: 1); a node costs this price times its GPUs
    region: str = ""
    date: str = ""
    source: str = ""

    def of(self, spot: bool) -> float | None:
        """USD per hour on the spot or the on-demand market; None if that market has no price."""
        return self.spot_usd_per_hour if spot else self.usd_per_hour


@dataclass(frozen=True, slots=True)
class NodePrice:
    """The name and the price of a node. Without a price, `usd_per_hour` is None and `problem` says why."""

    name: str
    usd_per_hour: float | None
    problem: str = ""


def load_prices(paths: Sequence[str]) -> list[Price]:
    """The rows of YAML files and SkyPilot catalogs (*.csv). An earlier file hides an instance's rows in later files.

    Relative paths are looked up in the working folder, then in this repository.

    Raises:
        UserError: no such file, no table of prices, a row without its name, or a price that is not a number >= 0.
    """
    rows: list[Price] = []
    for path in paths:
        known = {row.instance for row in rows}
        file = next((p for p in (Path(path).expanduser(), REPOSITORY / path) if p.is_file()), None)
        if file is None:
            raise UserError(f"cost.prices must name price files, found none at {path}")
        try:
            text = file.read_text()
            found = _read_catalog(path, text) if file.suffix == ".csv" else _read_yaml(path, text)
        except (YAMLError, UnicodeDecodeError, OSError, csv.Error) as error:
            raise UserError(f"{path} must be a readable price file: {type(error).__name__}: {error}") from error
        rows += [row for row in found if row.instance not in known]
    return rows


def find_instance(prices: Sequence[Price], instance: str, *, region: str | None, spot: bool) -> NodePrice:
    """The price of an instance by name. An unknown or ambiguous instance returns a `NodePrice` with a problem."""
    rows = [row for row in prices if row.instance == instance]
    if not rows:
        return NodePrice(instance, None, f"no price file knows the instance {instance}")
    return _one_price(instance, rows, region, spot)


def price_node(node: Mapping[str, Any], prices: Sequence[Price], *, region: str | None, spot: bool) -> NodePrice:
    """The price of a node as `ray.nodes()` lists it. The labels of the node override `region` and `spot`.

    A node with fewer GPUs than its instance (a pod, say) costs its share of the instance. A node with more GPUs cannot
    be that instance and has no price, unless all its rows are `per_gpu`.
    """
    labels, resources = node.get("Labels") or {}, node.get("Resources") or {}
    region = labels.get(REGION_LABEL) or region
    spot = labels[MARKET_LABEL] == "spot" if labels.get(MARKET_LABEL) else spot
    instance = next((labels[name] for name in INSTANCE_LABELS if labels.get(name)), None)
    gpus = resources.get("GPU", 0)
    if instance:
        found = find_instance(prices, instance, region=region, spot=spot)
        rows = [row for row in prices if row.instance == instance]
        count = max((row.count for row in rows), default=0)
        if found.usd_per_hour is None or not gpus or not count or gpus == count:
            return found
        if gpus > count and not all(row.per_gpu for row in rows):
            return NodePrice(f"{instance} with {gpus:g} GPUs", None, f"{instance} has {count:g} in the price files")
        name = f"{gpus:g}/{count:g} of {instance}" if gpus < count else f"{gpus:g} x {instance}"
        return NodePrice(name, found.usd_per_hour * gpus / count)
    kind = labels.get(ACCELERATOR_LABEL) or next(
        (name.removeprefix(ACCELERATOR_RESOURCE) for name in resources if name.startswith(ACCELERATOR_RESOURCE)), None
    )
    if not kind or not gpus:
        return NodePrice("unknown node", None, "it has neither an instance-type label nor an accelerator type")
    name = f"{gpus:g} x {kind}"
    rows = [row for row in prices if row.count == gpus and (row.gpu == kind or row.gpu.startswith(f"{kind}-"))]
    if not rows:
        return NodePrice(name, None, f"no price file has an instance with {name}")
    return _one_price(name, rows, region, spot)


def _one_price(name: str, rows: Sequence[Price], region: str | None, spot: bool) -> NodePrice:
    """The price on which the rows agree, in `region` if it is given. Of the zones of a region, the dearest counts."""
    if region and any(row.region for row in rows):
        rows = [row for row in rows if row.region in (region, "")]
        rows = [row for row in rows if row.region] or rows  # rows without a region count only if no other row fits
        if not rows:
            return NodePrice(name, None, f"no price of {name} in {region}")
    market = "spot" if spot else "on-demand"
    offers: dict[tuple[str, str], float] = {}
    for row in rows:
        usd, key = row.of(spot), (row.instance, row.region)
        if usd is not None:
            offers[key] = max(usd, offers.get(key, 0.0))
    if not offers:
        return NodePrice(name, None, f"no {market} price of {name}")
    if len(set(offers.values())) > 1:
        several = ", ".join(f"{' in '.join(filter(None, key))} ${usd:g}" for key, usd in list(offers.items())[:4])
        advice = "an instance-type label on the node, or cost.region, decides"
        return NodePrice(name, None, f"several {market} prices of {name} ({several}); {advice}")
    return NodePrice(f"{next(iter(offers))[0]}{' spot' if spot else ''}", next(iter(offers.values())))


def _read_yaml(path: str, text: str) -> list[Price]:
    loaded = safe_load(text)
    rows = loaded.get("prices") if isinstance(loaded, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must hold a list of rows under `prices`")
    known = {field.name for field in fields(Price)}
    for row in rows:
        if unknown := sorted(set(row) - known):
            raise UserError(f"{path}: unknown key {unknown[0]} of {row.get('instance')}; known: {', '.join(known)}")
    return [_price(path, **row) for row in rows]


def _read_catalog(path: str, text: str) -> list[Price]:
    """Rows of a SkyPilot catalog: InstanceType, AcceleratorName, AcceleratorCount, Price, SpotPrice, Region."""
    reader = csv.DictReader(io.StringIO(text))
    if missing := {"InstanceType", "Price"} - set(reader.fieldnames or ()):
        raise UserError(f"{path} must have SkyPilot's columns, found no {sorted(missing)[0]}")
    return [
        _price(
            path,
            instance=row["InstanceType"],
            usd_per_hour=row["Price"] or None,
            spot_usd_per_hour=row.get("SpotPrice") or None,
            gpu=row.get("AcceleratorName") or "",
            count=row.get("AcceleratorCount") or 0,
            region=row.get("Region") or "",
            source=path,
        )
        for row in reader
        if row["InstanceType"]
    ]


def _price(path: str, **row: Any) -> Price:
    """The checked row of a price file; numbers may stand as text, as they do in a catalog.

    Raises:
        UserError: if the row has no instance, no price, or a value of the wrong type.
    """
    instance = row.get("instance")
    if not instance or not isinstance(instance, str):
        raise UserError(f"{path}: every row must name its instance, got {row}")
    for name in ("usd_per_hour", "spot_usd_per_hour", "count"):
        value = row.get(name)
        if value is None and name != "count":  # a market without a price; a missing count is 0
            row[name] = None
            continue
        try:
            number = float(0 if value is None else value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number) or number < 0:
            raise UserError(f"{path}: {name} of {instance} must be a number, at least 0, got {value!r}")
        row[name] = number
    if row["usd_per_hour"] is None and row["spot_usd_per_hour"] is None:
        raise UserError(f"{path}: {instance} must have usd_per_hour or spot_usd_per_hour")
    if not isinstance(row.get("per_gpu", False), bool):
        raise UserError(f"{path}: per_gpu of {instance} must be true or false, got {row['per_gpu']!r}")
    texts: dict[str, Any] = {name: str(row[name]) for name in ("gpu", "region", "date", "source") if name in row}
    return Price(**row | texts)
