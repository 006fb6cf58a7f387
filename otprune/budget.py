"""The settings of a method that cost what a target, for one a selector at a retention, costs."""

from collections.abc import Callable
from typing import Any

from otprune.layerwise import Policy
from otprune.methods import METHODS, InModel, Method, get_method
from otprune.methods.search import Search
from otprune.part_flops import prefill_flops, selector_prefill
from otprune.schedules import Schedule
from otprune.shapes import LanguageShape

__all__ = ["layer_rows", "make_policy", "match_budget", "match_flops", "selector_prefill"]


def make_policy(method: str | Method, settings: dict[str, Any]) -> Policy | None:
    """The policy of a method inside the model with resolved settings; None for the others."""
    method = get_method(method)
    return method.policy(**settings) if isinstance(method, InModel) else None


def layer_rows(method: str | Method, settings: dict[str, Any], num_visual: int, num_layers: int) -> Schedule | None:
    """Visual tokens of each layer for a method that prunes inside the model; None for the others."""
    method = get_method(method)
    return method.visual_rows(num_visual, num_layers, **settings) if method.inside_model else None


def match_budget(
    method: str | Method, settings: dict[str, Any], retention: float, shape: LanguageShape, text: int, num_visual: int
) -> tuple[dict[str, Any], float, float]:
    """`settings` with what is None in them filled in, so that prefill costs no less than a selector's at `retention`;
    and both prefills, the method's and the selector's, as shares of the unpruned one.

    Raises:
        ValueError: as `visual_rows`, on settings that the model's layers or tokens do not allow.
    """
    method = get_method(method)

    def flops(**given: Any) -> int:
        return prefill_flops(shape, text, visual=method.visual_rows(num_visual, shape.layers, **given))

    target = selector_prefill(shape, text, num_visual, retention)
    full = prefill_flops(shape, text + num_visual)
    sizes: dict[str, Any] = {"num_visual": num_visual, "num_layers": shape.layers}
    settings = match_flops(method, flops, target, **sizes, **settings)
    return settings, flops(**settings) / full, target / full


def match_flops(
    method: str | Method,
    flops: Callable[..., float],
    target: float,
    *,
    num_visual: int,
    num_layers: int,
    **given: Any,
) -> dict[str, Any]:
    """The settings of `method`'s smallest budget whose `flops(**settings)` is not below `target`.

    `flops` is any book on any scale that grows with the budget, e.g.
    `lambda **s: paper_table("llava-1.5-7b", "vtw", **s)[2]` or `lambda **s: true_flops(model, "vtw", ..., **s).total`.

    `given` are settings that stay, and what else narrows the search: pyramiddrop's stages begin at `layers`, fitprune
    takes one of `recipes`. Which budgets are tried, the method's own file says.

    Raises:
        ValueError: if even the largest budget is below the target, or the method has no budget to search.
    """
    chosen = get_method(method)
    if chosen.match is None:
        searched = ", ".join(name for name, each in METHODS.items() if each.match)
        raise ValueError(f"method must be one of {searched}, which have budgets to search, got {chosen.name!r}")
    return chosen.match(Search(flops=flops, target=target, num_visual=num_visual, num_layers=num_layers), **given)
