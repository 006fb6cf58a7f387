"""How many visual tokens each layer of the language model works on, method by method.

A schedule is a list of (rows in attention, rows in FFN), one pair a layer. Selectors and reducers shorten the prompt
before layer 0, so every pair is the same; in-LLM methods start from all tokens. The rows in attention of a layer are
also what its key-value cache holds afterwards.
"""

from collections.abc import Mapping
from typing import Any

from otprune.select import num_kept

Schedule = list[tuple[int, int]]

SETTINGS = {
    "none": (),
    "m3": ("tokens",),
    "prumerge_plus": ("tokens",),
    "vtw": ("layer",),
    "fastv": ("layer", "kept"),
    "fitprune": ("recipe",),
    "pyramiddrop": ("stages",),
}
"""What each method that is not a selector must be told. Selectors take `retention`."""


def visual_rows(
    method: str, num_visual: int, num_layers: int, *, as_released: bool = False, **settings: Any
) -> Schedule:
    """Visual tokens in each layer's attention and FFN, as `otprune.layerwise` runs it.

    Settings by method (sources: the methods' papers and released recipes):
        none: nothing. Every token everywhere.
        m3: tokens = what the pooled grid has. prumerge_plus: tokens = what it leaves of the image, or on average.
        vtw: layer = K; layers 0 .. K-1 see all tokens, the others none.
        fastv: layer = K, kept; layers 0 .. K-1 see all tokens, the others `kept`.
        fitprune: recipe = {layer: number deleted}; the deleted leave after that layer, or with `as_released` after
            its attention and before its FFN, where the release drops them.
        pyramiddrop: stages = {layer: tokens kept from this layer on}.
        any other: a selector, or prumerge; retention in (0, 1], `num_kept` of it from layer 0 on.

    Raises:
        ValueError: on missing or unknown settings, or values out of range.
    """
    expected = SETTINGS.get(method, ("retention",))
    if set(settings) != set(expected):
        raise ValueError(f"settings of {method} must be {list(expected)}, got {sorted(settings)}")
    if num_visual < 1 or num_layers < 1:
        raise ValueError(f"num_visual and num_layers must be at least 1, got {num_visual} and {num_layers}")
    match method:
        case "none":
            return _stages(num_visual, num_layers, {})
        case "m3" | "prumerge_plus":
            return _stages(num_visual, num_layers, {0: settings["tokens"]})
        case "vtw":
            return _stages(num_visual, num_layers, {settings["layer"]: 0})
        case "fastv":
            return _stages(num_visual, num_layers, {settings["layer"]: settings["kept"]})
        case "fitprune":
            return _recipe(num_visual, num_layers, settings["recipe"], as_released)
        case "pyramiddrop":
            return _stages(num_visual, num_layers, settings["stages"])
        case _:
            return _stages(num_visual, num_layers, {0: num_kept(settings["retention"], num_visual)})


def _stages(num_visual: int, num_layers: int, stages: Mapping[int, int]) -> Schedule:
    rows, left = [], num_visual
    for layer, kept in sorted(stages.items()):
        if not 0 <= layer <= num_layers:
            raise ValueError(f"layer must be in [0, {num_layers}], got {layer}")
        if not 0 <= kept <= left:
            raise ValueError(f"tokens kept from layer {layer} on must be in [0, {left}], got {kept}")
        rows += [(left, left)] * (layer - len(rows))
        left = kept
    return rows + [(left, left)] * (num_layers - len(rows))


def _recipe(num_visual: int, num_layers: int, recipe: Mapping[int, int], as_released: bool) -> Schedule:
    outside = [layer for layer in recipe if not 0 <= layer < num_layers]
    if outside or any(deleted < 0 for deleted in recipe.values()) or sum(recipe.values()) > num_visual:
        raise ValueError(
            f"recipe must delete at most {num_visual} tokens in all, in layers [0, {num_layers}), got {dict(recipe)}"
        )
    rows, left = [], num_visual
    for layer in range(num_layers):
        after = left - recipe.get(layer, 0)
        rows.append((left, after if as_released else left))
        left = after
    return rows
