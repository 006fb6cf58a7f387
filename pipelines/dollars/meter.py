"""Dollars: what the nodes of the cluster are held for (billed), and what the stages make of it (useful).

    held      every node from the job's start, or from when it joined, until it leaves or the job ends
    busy      seconds in which a stage's actors and tasks were at work, by the units' own records
    idle      held minus busy, in the scarce resource: GPU-seconds where stages use GPUs, else Ray's logical CPU-seconds

`price_run` turns dollars and counts into the metrics; it and `Attribution` are plain arithmetic, for sweeps as well.
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
    """How nodes are priced: one price for the whole cluster (`usd_per_hour`), else by rows of price files."""

    prices: tuple[Price, ...] = ()
    usd_per_hour: float | None = None
    region: str | None = None
    spot: bool = False

    def node(self, node: Mapping[str, Any]) -> NodePrice:
        return price_node(node, self.prices, region=self.region, spot=self.spot)


def make_tariff(config: CostConfig) -> Tariff:
    """The tariff of a configuration.

    Raises:
        UserError: if a price file is missing or wrong.
    """
    return Tariff(tuple(load_prices(config.prices)), config.usd_per_hour, config.region, config.spot)


def check_instances(config: Config) -> list[tuple[NodePrice, float | None]]:
    """Price and relative speed (None: not given) of every entry `NAME` or `NAME:SPEED` of estimate.instances.

    Raises:
        UserError: if a price file is missing or wrong, an instance has not one price, or a speed is no number above 0.
    """
    tariff, found = make_tariff(config.cost), []
    for entry in config.estimate.instances:
        name, _, speed = entry.partition(":")
        price = find_instance(tariff.prices, name, region=tariff.region, spot=tariff.spot)
        if price.usd_per_hour is None:
            raise UserError(f"estimate.instances must be priced by cost.prices: {price.problem}")
        try:
            factor = float(speed) if speed else None
        except ValueError:
            factor = 0.0
        if factor is not None and not 0 < factor < float("inf"):
            raise UserError(f"estimate.instances must be NAME or NAME:SPEED with a speed above 0, got {entry!r}")
        found.append((price, factor))
    return found


@dataclass(slots=True)
class Held:
    """A node of the cluster: what it is and costs, what it holds, and since and until when (seconds of the clock)."""

    price: NodePrice
    since: float
    until: float | None = None
    cpus: float = 0.0
    gpus: float = 0.0

    def seconds(self, now: float) -> float:
        """Until `now`, a moment of the clock."""
        return max(0.0, (now if self.until is None else min(self.until, now)) - self.since)


class Meter:
    """Follows the nodes of the cluster and adds up what they cost. Safe to poll from one thread and read from another.

    Args:
        started: when the job began, on `clock`: nodes of the first poll are held since then.
    """

    def __init__(self, tariff: Tariff, started: float, clock: Callable[[], float] = time.perf_counter):
        self.tariff, self.started, self.clock = tariff, started, clock
        self._nodes: dict[str, Held] = {}
        self._ended: float | None = None
        self._polled = False
        self._lock = threading.Lock()

    def poll(self, nodes: Iterable[Mapping[str, Any]]) -> list[Held]:
        """Takes note of `ray.nodes()`: who joined, who left. Returns the nodes that were not known before."""
        with self._lock:
            now, new = self.now, []
            alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
            for name, node in alive.items():
                if name not in self._nodes:
                    resources = node.get("Resources") or {}
                    since = now if self._polled else self.started
                    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
                    new.append(Held(self.tariff.node(node), since, None, cpus, gpus))
                    self._nodes[name] = new[-1]
            for name, held in self._nodes.items():
                if name not in alive and held.until is None:
                    held.until = now
                elif name in alive and held.until is not None:  # it was out of sight for a while, and is billed
                    held.until = None
            self._polled = True
            return new

    def stop(self) -> None:
        """Ends the metering: nothing is held after it."""
        self._ended = self._ended or self.clock()

    @property
    def now(self) -> float:
        return self.clock() if self._ended is None else self._ended

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return self.now - self.started

    @property
    def usd(self) -> float | None:
        """Dollars so far of everything that has a price; None if nothing has."""
        return self.usd_until(self.now)

    def usd_until(self, moment: float) -> float | None:
        """Dollars up to a moment of the clock."""
        if self.tariff.usd_per_hour is not None:
            return self.tariff.usd_per_hour * max(0.0, moment - self.started) / 3600
        priced = [held for held in self._held() if held.price.usd_per_hour is not None]
        if not priced:
            return None
        return sum((held.price.usd_per_hour or 0.0) * held.seconds(moment) for held in priced) / 3600

    @property
    def usd_per_hour(self) -> float | None:
        """What the nodes that are held now cost; None if one of them has no price."""
        if self.tariff.usd_per_hour is not None:
            return self.tariff.usd_per_hour
        prices = [held.price.usd_per_hour for held in self._held() if held.until is None]
        priced = [price for price in prices if price is not None]
        return sum(priced) if priced and len(priced) == len(prices) else None

    @property
    def unpriced(self) -> Counter[str]:
        """Why nodes have no price -> how many; empty with cost.usd_per_hour."""
        if self.tariff.usd_per_hour is not None:
            return Counter()
        return Counter(f"{held.price.name}: {held.price.problem}" for held in self._held() if held.price.problem)

    @property
    def node_seconds(self) -> dict[str, float]:
        """Seconds held by name of instance; nodes without a price under what is known of them."""
        now, total = self.now, defaultdict[str, float](float)
        for held in self._held():
            total[held.price.name] += held.seconds(now)
        return dict(total)

    def capacity(self, resource: str) -> float:
        """CPU- or GPU-seconds held."""
        now = self.now
        return sum((held.gpus if resource == "GPU" else held.cpus) * held.seconds(now) for held in self._held())

    def _held(self) -> list[Held]:
        with self._lock:
            return list(self._nodes.values())
