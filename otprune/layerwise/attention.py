"""The few attention weights that a policy reads, beside the fused attention that gives none.

A layer is run fused and unchanged. What a policy needs is computed again from the layer's own weights and, where the
layer has run, its cached keys: one row costs O(L D) and the projection of one query, and of all keys where the layer
has not run; the head-wise maximum O(L^2 D) and the projection of all queries, and never holds more than one head's
matrix at a time. `otprune.flops` counts all of it.

Written for the attention of LLaMA and its descendants (Mistral, Qwen2, Qwen3): RMS norm, projections, an optional norm
of queries and keys, rotary embedding with the halves of a head rotated against each other.

Shape suffixes: B prompts, L rows, D model width, H heads, E head width. Weights are float32.
"""

from typing import Any

import torch
from torch import Tensor

from otprune.layerwise.layout import Layout

Rotary = tuple[Tensor, Tensor]
"""cos and sin, [B, L, E] each."""


def last_row(layer: Any, hidden_BLD: Tensor, rotary: Rotary, layout: Layout, keys: Tensor | None) -> Tensor:
    """[B, L]: how much the last prompt token looks at every row in `layer`, mean over heads; 0 for padding.

    `hidden_BLD` enters the layer. `keys` are the layer's cached ones, None if it has not run.
    """
    cos, sin = rotary
    query_BH1E = project(layer, "q", hidden_BLD[:, -1:], (cos[:, -1:], sin[:, -1:]))
    keys = project(layer, "k", hidden_BLD, rotary) if keys is None else keys
    keys = keys.float().repeat_interleave(query_BH1E.shape[1] // keys.shape[1], dim=1)
    score_BH1L = query_BH1E.float() @ keys.mT * layer.self_attn.scaling
    score_BH1L = score_BH1L.masked_fill(~layout.valid[:, None, None, :], -torch.inf)
    return score_BH1L.softmax(dim=-1).mean(dim=1).squeeze(1)


def headmax(layer: Any, hidden_BLD: Tensor, rotary: Rotary, layout: Layout, keys: Tensor) -> Tensor:
    """[B, L, L]: the attention matrix of `layer` (a row looks at columns), the largest over heads in every place."""
    query_BHLE = project(layer, "q", hidden_BLD, rotary)
    group = query_BHLE.shape[1] // keys.shape[1]
    length = layout.valid.shape[1]
    mask = layout.causal_mask()
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=keys.device).tril()
    largest_BLL = query_BHLE.new_zeros(len(keys), length, length, dtype=torch.float32)
    for head in range(query_BHLE.shape[1]):
        score_BLL = query_BHLE[:, head].float() @ keys[:, head // group].float().mT * layer.self_attn.scaling
        weight_BLL = score_BLL.masked_fill(~mask[:, 0], -torch.inf).softmax(dim=-1)
        torch.maximum(largest_BLL, weight_BLL, out=largest_BLL)
    return largest_BLL


def project(layer: Any, kind: str, hidden_BLD: Tensor, rotary: Rotary) -> Tensor:
    """Rotated queries (kind "q") or keys ("k") [B, heads, L, E] of rows that enter `layer`."""
    attention = layer.self_attn
    states = getattr(attention, f"{kind}_proj")(layer.input_layernorm(hidden_BLD))
    states = states.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{kind}_norm"):
        states = getattr(attention, f"{kind}_norm")(states)
    states_BHLE = states.transpose(1, 2)
    cos, sin = (part[:, None] for part in rotary)
    left, right = states_BHLE.chunk(2, dim=-1)
    return states_BHLE * cos + torch.cat([-right, left], dim=-1) * sin


def limited_attention(config: Any) -> str | None:
    """What keeps some layer of the model from seeing every token before it; None if nothing does."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layers {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"a sliding window of {config.sliding_window}"
    return None


def attention_mass(headmax_BLL: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """FitPrune's (self [B, L], cross [B, L]) mass of every column: its attention from image rows, their mean, and from
    text rows, their sum.

    All text rows are summed: those before the image see none of it.
    """
    image_BL = layout.image.to(headmax_BLL.dtype)
    text_BL = (layout.valid & ~layout.image).to(headmax_BLL.dtype)
    num_image_B1 = image_BL.sum(dim=1, keepdim=True).clamp_min(1)
    return (image_BL[:, None] @ headmax_BLL)[:, 0] / num_image_B1, (text_BL[:, None] @ headmax_BLL)[:, 0]
