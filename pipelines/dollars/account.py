"""The account of a run: the bill of its nodes, the bills of the output's earlier runs, and the split by stage."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.dollars.attribution import attribute, price_images
from pipelines.dollars.ledger import Spent
from pipelines.dollars.meter import Meter


@dataclass(slots=True)
class Account:
    """Everything that the dollars of a run are computed from."""

    meter: Meter
    earlier: Spent  # by earlier runs of this output
    resource: str = "CPU"  # GPU or CPU: the dollars are split in proportion to the use of this resource
    weights: dict[str, float] = field(default_factory=dict)  # stage -> units of `resource` of one actor or task
    gate: tuple[float, float] | None = None  # begin and end of the gate on the meter's clock

    @property
    def usd_of_output(self) -> float | None:
        """Dollars of this run and of the earlier runs; None if this run has no price."""
        return self._with_earlier(self.meter.usd)

    @property
    def gate_seconds(self) -> float:
        return self.gate[1] - self.gate[0] if self.gate else 0.0

    def spent(self) -> Spent:
        """The sums over all runs of the output, this run included."""
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

        While a node has no price, `usd_total` is the cost of the other nodes, and the prices per image and the split by
        stage are left out.

        Args:
            first_unit: seconds from the start of the run to the first unit in an actor; the gate lies within them.
            busy: stage -> seconds of work, summed over actors or tasks.
            images: captioned images.
            tokens: generated tokens.
            rates: `images_per_second`, and the ends of its interval.
            usd_to_finish: dollars to the end of the plan; None if unknown.
        """
        usd, capacity = self.meter.usd, self.meter.capacity(self.resource)
        startup, gate = self._shares_before_first_unit(first_unit)
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

    def _shares_before_first_unit(self, first_unit: float) -> tuple[float, float]:
        """Shares of the dollars: (start-up without the gate, gate). Without any price: shares of the seconds."""
        meter, gate = self.meter, self.gate or (self.meter.started, self.meter.started)
        moments = (meter.started + first_unit, *gate, meter.now)
        usd = [meter.usd_until(moment) or 0.0 for moment in moments]
        until_first, gate_began, gate_ended, total = usd if usd[-1] > 0 else [m - meter.started for m in moments]
        total = max(total, 1e-12)
        gate_share = (gate_ended - gate_began) / total
        return max(0.0, until_first / total - gate_share), gate_share
