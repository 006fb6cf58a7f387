"""Schedules: how many visual tokens each layer of the language model processes.

A schedule is a list of (rows in attention, rows in FFN), one pair a layer. Selectors and reducers shorten the prompt
before layer 0, so all their pairs are equal; methods inside the model start from all tokens. The key-value cache of a
layer holds as many rows as its attention. Each method's record (`otprune.methods`) makes its own schedule.
"""

from collections.abc import Mapping

Schedule = list[tuple[int, int]]
"""One (rows in attention, rows in FFN) a layer."""


def num_kept(retention: float, num_tokens: int) -> int:
    """The number of tokens that `retention` keeps of `num_tokens`: Python's round, at least 1. 0.098 of 576 is 56.

    Raises:
        ValueError: if retention is outside (0, 1] or num_tokens below 1.
    """
    if not 0 < retention <= 1:
        raise ValueError(f"retention must be in (0, 1], got {retention}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    return max(1, round(retention * num_tokens))


def stage_rows(num_visual: int, num_layers: int, stages: Mapping[int, int]) -> Schedule:
    """The schedule of `stages`: {layer: visual tokens from this layer on}. Earlier layers process all visual tokens.

    Raises:
        ValueError: on a layer outside [0, num_layers], or a stage with more tokens than the previous one.
    """
    rows, left = [], num_visual
    for layer, kept in sorted(stages.items()):
        if not 0 <= layer <= num_layers:
            raise ValueError(f"layer must be in [0, {num_layers}], got {layer}")
        if not 0 <= kept <= left:
            raise ValueError(f"tokens kept from layer {layer} on must be in [0, {left}], got {kept}")
        rows += [(left, left)] * (layer - len(rows))
        left = kept
    return rows + [(left, left)] * (num_layers - len(rows))


def recipe_rows(num_visual: int, num_layers: int, recipe: Mapping[int, int], *, before_ffn: bool = False) -> Schedule:
    """The schedule of `recipe`: {layer: visual tokens that it deletes}.

    The tokens leave after the whole layer, or with `before_ffn` between its attention and its FFN.

    Raises:
        ValueError: on a layer outside [0, num_layers), a negative number, or more deletions than tokens.
    """
    outside = [layer for layer in recipe if not 0 <= layer < num_layers]
    if outside or any(deleted < 0 for deleted in recipe.values()) or sum(recipe.values()) > num_visual:
        raise ValueError(
            f"recipe must delete at most {num_visual} tokens in all, in layers [0, {num_layers}), got {dict(recipe)}"
        )
    rows, left = [], num_visual
    for layer in range(num_layers):
        after = left - recipe.get(layer, 0)
        rows.append((left, after if before_ffn else left))
        left = after
    return rows
