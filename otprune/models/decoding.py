"""Decodes a batch of embedded prompts: one prefill, then one token a row at each step; finished rows leave the batch.

Every random number belongs to a request and not to its batch: a sampled answer does not depend on the other prompts in
the batch, up to the rounding of the batch's matrix products.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from otprune.layerwise.attention import limited_attention
from otprune.layerwise.layout import causal_mask
from otprune.layerwise.steps import FILL, check_every, marked, settled

LEAVE = 0.75  # finished rows leave the batch when at most this share of its rows is unfinished


@torch.inference_mode()
def decode(
    model: Any,
    embeds: Tensor,
    mask: Tensor,
    *,
    positions: Tensor | None = None,
    prefill: Mapping[str, Any] | None = None,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
) -> list[list[int]]:
    """The new token ids of each row, up to and including its first end token, at most `max_new_tokens`.

    When a quarter of the batch has finished, the finished rows leave the key-value cache, so that the other rows cost
    no more than a batch of their own.

    Args:
        model: a causal language model of transformers.
        embeds: [B, T, D], left-padded.
        mask: int64 [B, T], 1 for tokens and 0 for padding.
        positions: int64 [B, T] or, of a model with several axes, [axes, B, T]; None counts the tokens of each row. Each
            new token's position is one more than the last, on every axis.
        prefill: further arguments of the model for the prompt alone, such as DeepStack's rows.
        end_tokens: ids that end an answer.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from the nucleus of mass `top_p`.
        seeds: one a row; row i draws with the random numbers of `seeds[i]`. Unused at temperature 0.

    Raises:
        FloatingPointError: if logits are not finite.
    """
    rows = torch.arange(len(embeds), device=embeds.device)  # the index in `answers` of each row of the shrinking batch
    answers = torch.full((len(embeds), max_new_tokens), FILL, device=embeds.device)
    ends = torch.tensor(list(end_tokens), dtype=torch.long, device=embeds.device)
    draws = uniform_draws(seeds, max_new_tokens, embeds.device) if temperature > 0 else None
    every = check_every(embeds.device)

    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp_min(0) if positions is None else positions
    padded, only_2d, hybrid = not mask.all(), needs_2d_mask(model.config), is_hybrid(model.config)
    inputs: dict[str, Any] = {"inputs_embeds": embeds, **(prefill or {})}
    open_rows = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
    for step in range(max_new_tokens):
        logits = model(
            **inputs,
            attention_mask=_attention_mask(mask, step, only_2d, hybrid) if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = logits.argmax(1) if draws is None else draw(logits, temperature, top_p, draws[rows, step])
        written = marked(tokens, logits)
        answers[rows, step] = torch.where(open_rows, written, FILL)
        open_rows = open_rows & (written >= 0) & ~torch.isin(tokens, ends)
        if step + 1 == max_new_tokens:
            break
        positions = positions[..., -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if len(ends) and (step + 1) % every == 0:
            unfinished = open_rows.nonzero()[:, 0]  # waits for the device
            if not len(unfinished):
                break
            if len(unfinished) <= LEAVE * len(rows):
                # The states of linear attention have no batch_select_indices.
                cache.reorder_cache(unfinished)  # pyright: ignore[reportArgumentType] any int64 tensor
                rows, tokens = rows[unfinished], tokens[unfinished]
                positions, mask = positions[..., unfinished, :], mask[unfinished]
                open_rows = open_rows[unfinished]
        inputs = {"input_ids": tokens[:, None]}
    return settled(answers.tolist())


def _attention_mask(mask: Tensor, step: int, only_2d: bool, hybrid: bool) -> Tensor | dict[str, Tensor | None]:
    """The mask that the model gets at a step, from the int64 mask [B, T] of all tokens so far.

    transformers uses a mask of 4 dimensions as it is. It inspects one of 2 dimensions, and the inspection waits for the
    GPU at every step.
    """
    if only_2d:
        return mask
    every_token = mask[:, None, None].bool() if step else causal_mask(mask.bool())
    if not hybrid:
        return every_token
    # Linear attention sets the rows of padding to 0, with which they change no state. A new token is no padding.
    return {"full_attention": every_token, "linear_attention": None if step else mask}


def is_hybrid(config: Any) -> bool:
    """Whether some layers have linear attention and the others attend to every token."""
    return set(getattr(config, "layer_types", None) or ()) == {"full_attention", "linear_attention"}


def needs_2d_mask(config: Any) -> bool:
    """Whether transformers must make the masks: for windows, or attention that takes no bool mask [B, 1, L, L]."""
    limited = limited_attention(config) is not None and not is_hybrid(config)
    return config._attn_implementation != "sdpa" or limited


def uniform_draws(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The random numbers of each seed, float64 [B, count] in [0, 1), drawn on the CPU: all devices get the same."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def draw(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """Draws one token id a row, int64 [B], from the nucleus: the fewest likeliest tokens whose mass reaches `top_p`.

    `logits` are [B, V]. `uniform` [B] in [0, 1) selects the token by the inverse of the cumulative distribution, in
    descending order of probability. Source: Holtzman et al. 2020, section 3.1.
    """
    order = (logits.double() / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    mass = order.values.cumsum(1)
    inside = mass - order.values < top_p  # compares the mass before a token, so the likeliest token is always inside
    total = (order.values * inside).sum(1)
    picks = torch.searchsorted(mass, (uniform * total)[:, None], right=True)
    last = (inside.sum(1, keepdim=True) - 1).clamp_min(0)  # if the logits are NaN, no token is inside
    return order.indices.gather(1, picks.minimum(last))[:, 0]
