"""The account of a run: what its nodes cost, what earlier runs of the output cost, and where the dollars went."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.dollars.attribution import attribute, price_images
from pipelines.dollars.ledger import Spent
from pipelines.dollars.meter import Meter


@dataclass(slots=True)
class Account:
    """Everything that the dollars of a run are computed from.

    `gate` holds the moments at which the gate began and ended, on the meter's clock. `weights` says how many units of
    `resource` one actor or task of a stage holds.
    """

    meter: Meter
    earlier: Spent  # by earlier runs of this output
    resource: str = "CPU"  # that divides the dollars
    weights: dict[str, float] = field(default_factory=dict)
    gate: tuple[float, float] | None = None

    @property
    def usd_of_output(self) -> float | None:
        """Dollars of this run and of the earlier ones; None if this one has no price."""
        return self._with_earlier(self.meter.usd)

    @property
    def gate_seconds(self) -> float:
        return self.gate[1] - self.gate[0] if self.gate else 0.0

    def spent(self) -> Spent:
        """Of all runs of the output, this one included."""
        spent = copy.deepcopy(self.earlier)
        spent.add(self.meter.usd, self.meter.elapsed, self.meter.node_seconds)
        return spent

    def metrics(
        self,
        *,
        first_unit: float,
        busy: Mapping[str, float],
        images: int,
        tokens: int,
        rates: Mapping[str, float],
        usd_to_finish: float | None,
    ) -> dict[str, float]:
        """The dollars of the run so far, under their MLflow names.

        While a node has no price, nothing is divided by images, and `usd_total` is what the other nodes cost.

        Args:
            first_unit: seconds from the start to the first unit in an actor; the gate lies before it.
            busy: stage -> seconds of work, summed over actors or tasks.
            images: captioned images; `tokens` were generated.
            rates: `images_per_second`, and the ends of its interval.
        """
        usd, capacity = self.meter.usd, self.meter.capacity(self.resource)
        startup, gate = self._before(first_unit)
        shares = attribute(busy, self.weights, capacity, startup, gate)
        metrics: dict[str, Any] = {"node_hours": sum(self.meter.node_seconds.values()) / 3600}
        if capacity:
            metrics["idle_share"] = shares.idle
        if unpriced := self.meter.unpriced.total():
            metrics["nodes_unpriced"] = unpriced
        if usd is None:
            return metrics
        metrics |= {"usd_total": usd, "usd_of_output": self._with_earlier(usd)}
        if unpriced:
            return metrics
        steady = usd * (1 - startup - gate), self.meter.elapsed - first_unit
        metrics |= price_images(usd, images, tokens, steady, rates) | shares.dollars(usd)
        return metrics if usd_to_finish is None else metrics | {"usd_to_finish": usd_to_finish}

    def _with_earlier(self, usd: float | None) -> float | None:
        return None if usd is None else usd + self.earlier.usd

    def _before(self, first_unit: float) -> tuple[float, float]:
        """Shares of the dollars: of the start-up without the gate, and of the gate. Where nothing has a price, of the
        seconds."""
        meter, gate = self.meter, self.gate or (self.meter.started, self.meter.started)
        moments = (meter.started + first_unit, *gate, meter.now)
        usd = [meter.usd_until(moment) or 0.0 for moment in moments]
        until_first, gate_began, gate_ended, whole = usd if usd[-1] > 0 else [m - meter.started for m in moments]
        whole = max(whole, 1e-12)
        gate_share = (gate_ended - gate_began) / whole
        return max(0.0, until_first / whole - gate_share), gate_share
