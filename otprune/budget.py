"""The settings of a method inside the language model that cost what a selector costs at a retention."""

from collections.abc import Callable
from typing import Any

from otprune.flops import match_flops, prefill_flops
from otprune.layerwise import Policy
from otprune.methods import get_method
from otprune.methods.fastv import FastV
from otprune.methods.fitprune import FitPrune
from otprune.methods.pyramiddrop import PyramidDrop
from otprune.methods.vtw import VTW
from otprune.schedules import Schedule, visual_rows
from otprune.shapes import LanguageShape

POLICIES: dict[str, Callable[..., Policy]] = {
    "fastv": FastV,
    "vtw": VTW,
    "fitprune": FitPrune,
    "pyramiddrop": PyramidDrop,
}


def make_policy(method: str, settings: dict[str, Any]) -> Policy:
    """The policy of an in-LLM method with resolved settings."""
    return POLICIES[method](**settings)


def match_budget(
    method: str, settings: dict[str, Any], retention: float, shape: LanguageShape, text: int, num_visual: int
) -> tuple[dict[str, Any], float, float]:
    """`settings` with what is None in them filled in, so that prefill costs no less than a selector's at `retention`;
    and both prefills, the method's and the selector's, as shares of the unpruned one.

    Raises:
        ValueError: as `visual_rows`, on settings that the model's layers or tokens do not allow.
    """

    def flops(**given: Any) -> int:
        return prefill_flops(shape, text, visual=visual_rows(method, num_visual, shape.layers, **given))

    target = selector_prefill(shape, text, num_visual, retention)
    full = prefill_flops(shape, text + num_visual)
    sizes: dict[str, Any] = {"num_visual": num_visual, "num_layers": shape.layers}
    match method:
        case "fastv" if settings["kept"] is None:
            layer = settings["layer"] or (2 if flops(layer=2, kept=1) <= target else 1)
            settings = match_flops("fastv", flops, target, layer=layer, **sizes)
        case "fastv":
            settings = {"layer": settings["layer"] or 2, "kept": settings["kept"]}
        case "vtw" if settings["layer"] is None:
            settings = match_flops("vtw", flops, target, **sizes)
        case "pyramiddrop" if settings["stages"] is None:
            layers = sorted({shape.layers * quarter // 4 for quarter in (1, 2, 3)})
            settings = match_flops("pyramiddrop", flops, target, layers=layers, **sizes)
    return settings, flops(**settings) / full, target / full


def selector_prefill(shape: LanguageShape, text: int, num_visual: int, retention: float) -> int:
    """Multiply-adds of the prefill that a selector leaves at `retention`: the budget of every other method."""
    return prefill_flops(shape, text, visual=visual_rows("otprune", num_visual, shape.layers, retention=retention))


def layer_rows(method: str, settings: dict[str, Any], num_visual: int, num_layers: int) -> Schedule | None:
    """Visual tokens of each layer for a method that prunes inside the model; None for the others."""
    if get_method(method).kind != "in_llm":
        return None
    return visual_rows(method, num_visual, num_layers, **settings)
