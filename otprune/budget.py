"""Equal budgets: the settings under which a method costs as much as a target, e.g. a selector at a retention."""

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
    """The policy of a method inside the model; None for other methods. No value in `settings` may be None."""
    method = get_method(method)
    return method.policy(**settings) if isinstance(method, InModel) else None


def layer_rows(method: str | Method, settings: dict[str, Any], num_visual: int, num_layers: int) -> Schedule | None:
    """The schedule of a method that prunes inside the model; None for other methods."""
    method = get_method(method)
    return method.visual_rows(num_visual, num_layers, **settings) if method.inside_model else None


def match_budget(
    method: str | Method, settings: dict[str, Any], retention: float, shape: LanguageShape, text: int, num_visual: int
) -> tuple[dict[str, Any], float, float]:
    """Fills in the settings that are None, so that the method's prefill costs at least as much as a selector's.

    Args:
        retention: the selector's retention, in (0, 1].
        text: text tokens of the prompt.
        num_visual: visual tokens of an image before pruning.

    Returns:
        The complete settings; the cost of the method's prefill and that of the selector's, as shares of the unpruned
        prefill.

    Raises:
        ValueError: as `match_flops` and `visual_rows`, on settings that the model's layers or tokens do not allow.
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
    """The settings of the smallest budget of `method` whose cost is not below `target`.

    The method's own file defines which budgets the search tries.

    Args:
        flops: (**settings) -> cost, on any scale that grows with the budget, e.g.
            `lambda **s: paper_table("llava-1.5-7b", "vtw", **s)[2]` or
            `lambda **s: true_flops(model, "vtw", ..., **s).total`.
        target: a cost on the scale of `flops`.
        given: settings that stay as they are, and keywords that narrow the search: `layers` where pyramiddrop's stages
            begin, `recipes` that fitprune chooses from.

    Raises:
        ValueError: if even the largest budget costs less than the target, or the method has no budget to search.
    """
    record = get_method(method)
    if record.match is None:
        searched = ", ".join(name for name, known in METHODS.items() if known.match)
        raise ValueError(f"method must be one of {searched}, which have budgets to search, got {record.name!r}")
    given, apart = record.split(given) if isinstance(record, InModel) else (given, {})
    search = Search(flops=flops, target=target, num_visual=num_visual, num_layers=num_layers)
    return {**record.match(search, **given), **apart}
