"""Where the rows of a ragged, left-padded batch come from, and what is left of them after a deletion.

Shape suffixes: B prompts, L rows of the longest prompt, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One batch between two deletions. Padding stands at the left, so the last column is every prompt's last token."""

    position: Tensor
    """int64 [B, L], place in the whole prompt: a deletion leaves gaps. 0 for padding."""
    valid: Tensor
    """bool [B, L], False for padding."""
    image: Tensor
    """bool [B, L], image rows."""
    lengths: list[int]
    """Rows of each prompt, on the host."""
    num_image: list[int]
    """Image rows of each prompt, on the host."""

    @property
    def is_padded(self) -> bool:
        return min(self.lengths) < max(self.lengths)

    def causal_mask(self) -> Tensor | None:
        """bool [B, 1, L, L], True where a row may look; None where plain causal attention is right."""
        return causal_mask(self.valid) if self.is_padded else None


def causal_mask(valid_BL: Tensor) -> Tensor:
    """bool [B, 1, L, L], True where a row may look, from `valid_BL`, which is False for padding.

    A padding row looks at itself: a softmax over nothing is NaN in some of SDPA's CUDA kernels, and so is what other
    rows then make of it, with a weight of 0.
    """
    place_L = torch.arange(valid_BL.shape[1], device=valid_BL.device)
    causal_LL, itself_LL = place_L[:, None] >= place_L, place_L[:, None] == place_L
    return ((causal_LL & valid_BL[:, None]) | itself_LL)[:, None]


def pad_prompts(embeds: list[Tensor], image_spans: list[tuple[int, int]]) -> tuple[Tensor, Layout]:
    """Rows [L_i, D] of each prompt, left-padded to [B, L, D], and their layout. Spans are half-open.

    Raises:
        ValueError: on no prompts, unequal lists, rows that are not 2-D, or a prompt that is not text around exactly
            one image: the span must hold a token and leave text behind it.
    """
    if not embeds or len(embeds) != len(image_spans):
        raise ValueError(f"embeds and image_spans must be equally many, got {len(embeds)} and {len(image_spans)}")
    for index, (rows, (start, end)) in enumerate(zip(embeds, image_spans, strict=True)):
        if rows.ndim != 2:
            raise ValueError(f"embeds must be [rows, width] each, got shape {list(rows.shape)} in prompt {index}")
        if start >= end:
            raise ValueError(f"a prompt must hold an image, got the empty span ({start}, {end}) in prompt {index}")
        if not (start >= 0 and end < len(rows)):
            raise ValueError(
                f"an image must lie inside its prompt with text behind it, "
                f"got span ({start}, {end}) of {len(rows)} rows in prompt {index}"
            )
    device, lengths = embeds[0].device, [len(rows) for rows in embeds]
    start_B, end_B = torch.tensor(image_spans, device=device).unbind(dim=1)
    length_B = torch.tensor(lengths, device=device)
    position_BL = torch.arange(max(lengths), device=device) - (max(lengths) - length_B)[:, None]
    layout = Layout(
        position=position_BL.clamp_min(0),
        valid=position_BL >= 0,
        image=(position_BL >= start_B[:, None]) & (position_BL < end_B[:, None]),
        lengths=lengths,
        num_image=[end - start for start, end in image_spans],
    )
    return pad_sequence(embeds, batch_first=True, padding_side="left"), layout


def keep_rows(hidden_BLD: Tensor, layout: Layout, keep_BL: Tensor) -> tuple[Tensor, Layout]:
    """The batch with the image rows outside `keep_BL` gone, padded anew. Text always stays; order does too.

    One host synchronisation, for the new length.
    """
    keep_BL = torch.where(layout.image, keep_BL, layout.valid)
    lengths, num_image = torch.stack([keep_BL.sum(dim=1), (keep_BL & layout.image).sum(dim=1)]).tolist()
    if num_image == layout.num_image:
        return hidden_BLD, layout
    # False before True and otherwise in order: what goes moves to the left, where padding is
    order_BL = keep_BL.to(torch.int8).argsort(dim=1, stable=True)[:, -max(lengths) :]
    valid_BL = keep_BL.gather(1, order_BL)
    kept = Layout(
        position=layout.position.gather(1, order_BL).masked_fill(~valid_BL, 0),
        valid=valid_BL,
        image=layout.image.gather(1, order_BL) & valid_BL,
        lengths=lengths,
        num_image=num_image,
    )
    return hidden_BLD.gather(1, order_BL[:, :, None].expand(-1, -1, hidden_BLD.shape[-1])), kept
