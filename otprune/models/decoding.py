"""Decoding a batch of embedded prompts: one prefill, then one token a row and step, and finished rows leave the batch.

Every random number belongs to a request, not to its batch: an answer that is sampled does not depend on which other
prompts were decoded beside it (up to the rounding of a batch's matrix products).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from otprune.layerwise.attention import limited_attention
from otprune.layerwise.layout import causal_mask
from otprune.layerwise.steps import FILL, check_every, marked, settled

LEAVE = 0.75  # finished rows leave once no more than this share of the batch is still being answered


@torch.inference_mode()
def decode(
    model: Any,
    embeds: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
) -> list[list[int]]:
    """New token ids of each row, up to and with its first end token, or `max_new_tokens` of them.

    `model` is a transformers causal language model; `embeds` [B, T, D] are left-padded, `mask` int64 [B, T] is 1 where
    there is a token. Temperature 0 takes the likeliest token; above, row i draws from the nucleus of mass `top_p` with
    the numbers of `seeds[i]`.

    Finished rows are dropped from the key-value cache when a quarter of the batch has finished: what is left costs what
    it would alone.

    Raises:
        FloatingPointError: if logits are not finite.
    """
    rows = torch.arange(len(embeds), device=embeds.device)  # of the output, for each row of the shrinking batch
    answers = torch.full((len(embeds), max_new_tokens), FILL, device=embeds.device)
    ends = torch.tensor(list(end_tokens), dtype=torch.long, device=embeds.device)
    draws = uniform_draws(seeds, max_new_tokens, embeds.device) if temperature > 0 else None
    every = check_every(embeds.device)

    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded, only_2d = not mask.all(), needs_2d_mask(model.config)
    inputs: dict[str, Tensor] = {"inputs_embeds": embeds}
    open_rows = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device)
    for step in range(max_new_tokens):
        shown = mask if padded else None
        if padded and not only_2d:  # transformers passes on what has 4 dimensions; of 2, it asks the GPU at each step
            shown = mask[:, None, None].bool() if step else causal_mask(mask.bool())
        logits = model(
            **inputs,
            attention_mask=shown,
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
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if len(ends) and (step + 1) % every == 0:
            still = open_rows.nonzero()[:, 0]
            if not len(still):
                break
            if len(still) <= LEAVE * len(rows):
                cache.batch_select_indices(still)
                rows, tokens, positions, mask = rows[still], tokens[still], positions[still], mask[still]
                open_rows = open_rows[still]
        inputs = {"input_ids": tokens[:, None]}
    return settled(answers.tolist())


def needs_2d_mask(config: Any) -> bool:
    """Whether transformers must make the masks: for windows, and for attention that takes no bool [B, 1, L, L]."""
    return config._attn_implementation != "sdpa" or limited_attention(config) is not None


def uniform_draws(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """float64 [B, count] in [0, 1): the numbers of each seed, the same on every device."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def draw(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """One token id a row, int64 [B], from the nucleus: the likeliest tokens whose mass reaches `top_p`.

    `logits` [B, V]; `uniform` [B] in [0, 1) picks by the inverse of the cumulative distribution, likeliest first.
    Source: Holtzman et al. 2020, section 3.1.
    """
    order = (logits.double() / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    mass = order.values.cumsum(1)
    inside = mass - order.values < top_p  # the mass before a token; so the likeliest is always inside
    total = (order.values * inside).sum(1)
    picks = torch.searchsorted(mass, (uniform * total)[:, None], right=True)
    last = (inside.sum(1, keepdim=True) - 1).clamp_min(0)  # of logits that are NaN none is inside
    return order.indices.gather(1, picks.minimum(last))[:, 0]
