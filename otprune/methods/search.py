"""The search for a method's smallest budget that costs no less than a target."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The cost of a method's settings, and the cost that they should reach."""

    flops: Callable[..., float]
    """(**settings) -> cost, on any scale that grows with the budget."""
    target: float
    """A cost on the scale of `flops`."""
    num_visual: int
    num_layers: int

    def smallest(self, budgets: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first of `budgets` that costs no less than the target; `budgets` are settings in ascending order of cost.

        Raises:
            ValueError: if even the last budget costs less than the target.
        """
        # The order allows bisection: log2(n) evaluations of `flops` instead of n.
        first = bisect_left(budgets, self.target, key=lambda settings: self.flops(**settings))
        if first == len(budgets):
            most = self.flops(**budgets[-1])
            raise ValueError(f"target must be at most {most}, what the largest budget costs, got {self.target}")
        return budgets[first]
