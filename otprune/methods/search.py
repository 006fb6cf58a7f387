"""The search for a method's smallest budget that costs no less than a target."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """`flops(**settings)` is a method's cost, on any scale that grows with its budget, and `target` a cost on it."""

    flops: Callable[..., float]
    target: float
    num_visual: int
    num_layers: int

    def smallest(self, budgets: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first of `budgets`, settings in the order of their cost, whose cost is not below the target.

        Raises:
            ValueError: if even the last one's is.
        """
        first = bisect_left(budgets, self.target, key=lambda settings: self.flops(**settings))
        if first == len(budgets):
            most = self.flops(**budgets[-1])
            raise ValueError(f"target must be at most {most}, what the largest budget costs, got {self.target}")
        return budgets[first]
