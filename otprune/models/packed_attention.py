"""The attention of Qwen's vision towers over packed pictures, many segments at once.

A segment is a picture or a window of one; a patch attends to the patches of its own segment. Without FlashAttention,
transformers computes one segment after the other: for pictures of 1280 tokens, about a hundred calls a picture and
layer. Here segments of equal length are one batch, so the number of calls is that of different lengths: a picture cut
into windows has four at most (inside, right edge, lower edge, corner).

Shapes: S patches of all pictures, H heads, E width of a head, M segments of equal length, N patches of one of them.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


def pack_attention(tower: Any) -> "Segments":
    """Replaces the attention of each layer, keeping its weights and their names.

    Returns:
        What the layers remember of a call of the tower; the caller forgets it behind the call.
    """
    segments = Segments()
    for block in tower.blocks:
        block.attn = PackedAttention(block.attn, segments)
    return segments


class Segments:
    """The segments of one call of the tower, made once for all layers: reading their bounds waits for the device."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, list[Tensor]]] = {}  # by the identity of the bounds, which are held here

    def of(self, bounds: Tensor) -> list[Tensor]:
        """As `equal_segments`, on the device of the bounds."""
        if id(bounds) not in self._known:
            indices = [index.to(bounds.device) for index in equal_segments(bounds.tolist())]
            self._known[id(bounds)] = bounds, indices
        return self._known[id(bounds)][1]

    def forget(self) -> None:
        self._known.clear()


def equal_segments(bounds: list[int]) -> list[Tensor]:
    """The patches of the segments from each of the ascending `bounds` to the next: int64 [M, N] for each length N."""
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(bounds):
        starts.setdefault(end - start, []).append(start)
    return [torch.tensor(first)[:, None] + torch.arange(length) for length, first in starts.items()]


class PackedAttention(nn.Module):
    """A layer's attention with the weights of `attention`, transformers' own for either family."""

    def __init__(self, attention: Any, segments: Segments):
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.segments = (
            attention.qkv,
            attention.proj,
            attention.num_heads,
            segments,
        )

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """The attention's output [S, width] from hidden states [S, width]; `cu_seqlens` bound the segments."""
        queries, keys, values_SHE = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        queries_SHE, keys_SHE = apply_rotary_pos_emb_vision(queries, keys, *position_embeddings)
        output_SHE = torch.empty_like(values_SHE, memory_format=torch.contiguous_format)
        for index_MN in self.segments.of(cu_seqlens):
            batch = [rows_SHE[index_MN].transpose(1, 2) for rows_SHE in (queries_SHE, keys_SHE, values_SHE)]
            output_SHE[index_MN] = scaled_dot_product_attention(*batch).transpose(1, 2)
        return self.proj(output_SHE.flatten(1))
