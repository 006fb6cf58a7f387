"""The meter: for how long the run holds each node of the cluster, and the dollars of it.

    held      a node counts from the start of the job, or from its joining, until it leaves or the job ends
    busy      seconds in which the actors and tasks of a stage worked, by the records of the units
    idle      held minus busy, in the scarce resource: GPU-seconds where stages use GPUs, else Ray's logical CPU-seconds

The meter counts what is held, which is what a cloud bills. `attribution.py` splits the dollars into busy and idle.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config.keys import Config, CostConfig
from pipelines.dollars.prices import NodePrice, Price, find_instance, load_prices, price_node
from pipelines.errors import UserError


@dataclass(frozen=True, slots=True)
class Tariff:
    """The prices of nodes: `usd_per_hour` for the whole cluster if it is set, else the rows of price files."""

    prices: tuple[Price, ...] = ()
    usd_per_hour: float | None = None
    region: str | None = None
    spot: bool = False

    def node(self, node: Mapping[str, Any]) -> NodePrice:
        """The price of a node as `ray.nodes()` lists it, by the price files."""
        return price_node(node, self.prices, region=self.region, spot=self.spot)


def make_tariff(config: CostConfig) -> Tariff:
    """The tariff of a configuration.

    Raises:
        UserError: if a price file is missing or wrong.
    """
    return Tariff(tuple(load_prices(config.prices)), config.usd_per_hour, config.region, config.spot)


def check_instances(config: Config) -> list[tuple[NodePrice, float | None]]:
    """(price, relative speed or None) of every entry `NAME` or `NAME:SPEED` of estimate.instances.

    Raises:
        UserError: if a price file is missing or wrong, an instance has no single price, or a speed is no number > 0.
    """
    tariff, instances = make_tariff(config.cost), []
    for entry in config.estimate.instances:
        name, _, speed = entry.partition(":")
        price = find_instance(tariff.prices, name, region=tariff.region, spot=tariff.spot)
        if price.usd_per_hour is None:
            raise UserError(f"estimate.instances must be priced by cost.prices: {price.problem}")
        try:
            factor = float(speed) if speed else None
        except ValueError:
            factor = 0.0  # which the next check refuses
        if factor is not None and not 0 < factor < float("inf"):
            raise UserError(f"estimate.instances must be NAME or NAME:SPEED with a speed above 0, got {entry!r}")
        instances.append((price, factor))
    return instances


@dataclass(slots=True)
class HeldNode:
    """A node that the run holds: its price, its CPUs and GPUs, and its first and last moment (seconds of the clock)."""

    price: NodePrice
    since: float
    until: float | None = None  # None: still held
    cpus: float = 0.0
    gpus: float = 0.0

    def seconds(self, now: float) -> float:
        """Seconds held up to the moment `now` of the clock."""
        return max(0.0, (now if self.until is None else min(self.until, now)) - self.since)


class Meter:
    """Follows the nodes of the cluster and adds up their cost. One thread may poll while others read.

    Args:
        started: start of the job on `clock`. Nodes of the first poll count from this moment.
        clock: seconds; a test brings its own.
    """

    def __init__(self, tariff: Tariff, started: float, clock: Callable[[], float] = time.perf_counter):
        self.tariff, self.started, self.clock = tariff, started, clock
        self._nodes: dict[str, HeldNode] = {}
        self._ended: float | None = None
        self._polled = False
        self._lock = threading.Lock()

    def poll(self, nodes: Iterable[Mapping[str, Any]]) -> list[HeldNode]:
        """Notes which nodes of `ray.nodes()` joined and which left. Returns the nodes that are new."""
        with self._lock:
            now, new = self.now, []
            alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
            for name, node in alive.items():
                if name not in self._nodes:
                    resources = node.get("Resources") or {}
                    since = now if self._polled else self.started  # the first poll comes after Ray's own start-up
                    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
                    new.append(HeldNode(self.tariff.node(node), since, None, cpus, gpus))
                    self._nodes[name] = new[-1]
            for name, held_node in self._nodes.items():
                if name not in alive and held_node.until is None:
                    held_node.until = now
                elif name in alive and held_node.until is not None:  # Ray lost sight of it, but the cloud billed it
                    held_node.until = None
            self._polled = True
            return new

    def stop(self) -> None:
        """Stops the clock: no node costs anything after this moment. A second call changes nothing."""
        self._ended = self._ended or self.clock()

    @property
    def now(self) -> float:
        """The moment of the clock; after `stop`, the moment of the stop."""
        return self.clock() if self._ended is None else self._ended

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return self.now - self.started

    @property
    def usd(self) -> float | None:
        """Dollars so far of all nodes with a price; None if no node has one."""
        return self.usd_until(self.now)

    def usd_until(self, moment: float) -> float | None:
        """Dollars up to a moment of the clock, of all nodes with a price; None if no node has one."""
        if self.tariff.usd_per_hour is not None:
            return self.tariff.usd_per_hour * max(0.0, moment - self.started) / 3600
        priced = [held_node for held_node in self._snapshot() if held_node.price.usd_per_hour is not None]
        if not priced:
            return None
        return sum((held_node.price.usd_per_hour or 0.0) * held_node.seconds(moment) for held_node in priced) / 3600

    @property
    def usd_per_hour(self) -> float | None:
        """Dollars an hour of the nodes that are held now; None if one of them has no price, or none is held."""
        if self.tariff.usd_per_hour is not None:
            return self.tariff.usd_per_hour
        prices = [held_node.price.usd_per_hour for held_node in self._snapshot() if held_node.until is None]
        priced = [price for price in prices if price is not None]
        return sum(priced) if priced and len(priced) == len(prices) else None

    @property
    def unpriced(self) -> Counter[str]:
        """Reason why nodes have no price -> number of such nodes; empty with cost.usd_per_hour."""
        if self.tariff.usd_per_hour is not None:
            return Counter()
        return Counter(
            f"{held_node.price.name}: {held_node.price.problem}"
            for held_node in self._snapshot()
            if held_node.price.problem
        )

    @property
    def node_seconds(self) -> dict[str, float]:
        """Name of the `NodePrice` -> seconds held, nodes without a price included."""
        now, total = self.now, defaultdict[str, float](float)
        for held_node in self._snapshot():
            total[held_node.price.name] += held_node.seconds(now)
        return dict(total)

    def capacity(self, resource: str) -> float:
        """GPU-seconds held if `resource` is "GPU", else CPU-seconds."""
        now = self.now
        return sum(
            (held_node.gpus if resource == "GPU" else held_node.cpus) * held_node.seconds(now)
            for held_node in self._snapshot()
        )

    def _snapshot(self) -> list[HeldNode]:
        """The nodes so far. The copy may be iterated while another thread polls."""
        with self._lock:
            return list(self._nodes.values())
