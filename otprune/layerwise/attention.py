"""Computes the attention weights that a policy reads; the fused attention of the layers returns none.

The layers run unchanged, with fused attention. The functions here recompute the weights that a policy needs from the
layer's own parameters and, if the layer has run, from its cached keys. One row costs O(L D) and the projection of one
query; if the layer has not run, also the projection of all keys. The maximum over heads costs O(L^2 D) and the
projection of all queries, and never holds the matrices of two heads. `otprune.flops` counts all of it.

The module fits the attention of LLaMA and its descendants (Mistral, Qwen2, Qwen3): RMS norm, projections, an optional
norm of queries and keys, and a rotary embedding that rotates the two halves of a head against each other.

Shape suffixes: B prompts, L rows, D model width, H heads, E head width. Weights are float32.
"""

from typing import Any

import torch
from torch import Tensor

from otprune.layerwise.layout import Layout

Rotary = tuple[Tensor, Tensor]
"""cos and sin, [B, L, E] each."""


def last_row(layer: Any, hidden_BLD: Tensor, rotary: Rotary, layout: Layout, keys: Tensor | None) -> Tensor:
    """The last prompt token's attention to every row in `layer`, [B, L]: the mean over heads; 0 for padding.

    Args:
        hidden_BLD: the rows that enter the layer.
        keys: the layer's cached keys [B, key heads, L, E]; None if the layer has not run.
    """
    cos, sin = rotary
    query_BH1E = project(layer, "q", hidden_BLD[:, -1:], (cos[:, -1:], sin[:, -1:]))
    keys = project(layer, "k", hidden_BLD, rotary) if keys is None else keys
    # Grouped-query attention: several query heads share a key head.
    keys = keys.float().repeat_interleave(query_BH1E.shape[1] // keys.shape[1], dim=1)
    score_BH1L = query_BH1E.float() @ keys.mT * layer.self_attn.scaling
    score_BH1L = score_BH1L.masked_fill(~layout.valid[:, None, None, :], -torch.inf)
    return score_BH1L.softmax(dim=-1).mean(dim=1).squeeze(1)


def headmax(layer: Any, hidden_BLD: Tensor, rotary: Rotary, layout: Layout, keys: Tensor) -> Tensor:
    """The attention matrix of `layer`, [B, L, L]: row i attends to column j; every entry is the maximum over heads.

    `hidden_BLD` are the rows that enter the layer; `keys` [B, key heads, L, E] are its cached keys.
    """
    query_BHLE = project(layer, "q", hidden_BLD, rotary)
    group = query_BHLE.shape[1] // keys.shape[1]
    length = layout.valid.shape[1]
    mask = layout.causal_mask()
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=keys.device).tril()
    largest_BLL = query_BHLE.new_zeros(len(keys), length, length, dtype=torch.float32)
    for head in range(query_BHLE.shape[1]):  # one head at a time, so that the memory does not grow with H
        score_BLL = query_BHLE[:, head].float() @ keys[:, head // group].float().mT * layer.self_attn.scaling
        weight_BLL = score_BLL.masked_fill(~mask[:, 0], -torch.inf).softmax(dim=-1)
        torch.maximum(largest_BLL, weight_BLL, out=largest_BLL)
    return largest_BLL


def project(layer: Any, kind: str, hidden_BLD: Tensor, rotary: Rotary) -> Tensor:
    """Rotated queries (kind "q") or keys (kind "k") [B, heads, L, E] of the rows [B, L, D] that enter `layer`."""
    attention = layer.self_attn
    states = getattr(attention, f"{kind}_proj")(layer.input_layernorm(hidden_BLD))
    states = states.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{kind}_norm"):  # Qwen3
        states = getattr(attention, f"{kind}_norm")(states)
    states_BHLE = states.transpose(1, 2)
    cos, sin = (part[:, None] for part in rotary)
    left, right = states_BHLE.chunk(2, dim=-1)
    return states_BHLE * cos + torch.cat([-right, left], dim=-1) * sin


def limited_attention(config: Any) -> str | None:
    """The reason why some layer of the model does not attend to every earlier token; None if all layers do."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layers {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"a sliding window of {config.sliding_window}"
    return None


def attention_mass(headmax_BLL: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """FitPrune's self and cross mass [B, L] of every column: the mean over image rows and the sum over text rows.

    The sum is over all text rows, because the causal mask gives those before the image an attention of 0.
    """
    image_BL = layout.image.to(headmax_BLL.dtype)
    text_BL = (layout.valid & ~layout.image).to(headmax_BLL.dtype)
    num_image_B1 = image_BL.sum(dim=1, keepdim=True).clamp_min(1)
    return (image_BL[:, None] @ headmax_BLL)[:, 0] / num_image_B1, (text_BL[:, None] @ headmax_BLL)[:, 0]
