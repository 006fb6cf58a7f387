"""The layout of a ragged, left-padded batch: which rows are text, image or padding, before and after a deletion.

Shape suffixes: B prompts, L rows of the longest prompt, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The rows of a batch between two deletions. Padding is on the left: the last column holds the last tokens."""

    position: Tensor
    """int64 [B, L]: the row's position, by which its queries and keys are rotated; 0 for padding."""
    end: Tensor
    """int64 [B, 1]: the position of the first generated token."""
    valid: Tensor
    """bool [B, L]: False for padding."""
    image: Tensor
    """bool [B, L]: True for image rows."""
    lengths: list[int]
    """Rows of each prompt, held on the host so that reading them waits for no device."""
    num_image: list[int]
    """Image rows of each prompt, on the host too."""

    @property
    def is_padded(self) -> bool:
        return min(self.lengths) < max(self.lengths)

    def causal_mask(self) -> Tensor | None:
        """bool [B, 1, L, L], True where row i may attend to row j; None if plain causal attention is right."""
        return causal_mask(self.valid) if self.is_padded else None


def causal_mask(valid_BL: Tensor) -> Tensor:
    """bool [B, 1, L, L], True where row i may attend to row j, from `valid_BL`, which is False for padding.

    A padding row may attend to itself. With nothing to attend to, its softmax would be NaN in some of SDPA's CUDA
    kernels, and the NaN would spread to other rows although their weight for the padding row is 0.
    """
    place_L = torch.arange(valid_BL.shape[1], device=valid_BL.device)
    causal_LL, itself_LL = place_L[:, None] >= place_L, place_L[:, None] == place_L
    return ((causal_LL & valid_BL[:, None]) | itself_LL)[:, None]


def pad_prompts(embeds: list[Tensor], image_spans: list[tuple[int, int]]) -> tuple[Tensor, Layout]:
    """The rows [L_i, D] of each prompt, left-padded to [B, L, D], and their layout. Image spans are half-open.

    Raises:
        ValueError: without prompts, on lists of unequal lengths or rows that are not 2-D, or if a prompt is not text
            around exactly one image: the span must hold a row, and text must follow it.
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
        end=length_B[:, None],
        valid=position_BL >= 0,
        image=(position_BL >= start_B[:, None]) & (position_BL < end_B[:, None]),
        lengths=lengths,
        num_image=[end - start for start, end in image_spans],
    )
    return pad_sequence(embeds, batch_first=True, padding_side="left"), layout


def keep_rows(hidden_BLD: Tensor, layout: Layout, keep_BL: Tensor, *, renumber: bool = False) -> tuple[Tensor, Layout]:
    """Deletes the image rows outside `keep_BL` (bool [B, L]) and pads the batch again.

    Text rows always stay, and the order of rows too. If nothing is deleted, the arguments are returned unchanged. The
    new lengths cost one host synchronisation.

    Args:
        renumber: the rows that are left get the positions 0, 1, 2, ..., and generated tokens those behind them. By
            default all positions stay, so that a deletion leaves gaps.
    """
    keep_BL = torch.where(layout.image, keep_BL, layout.valid)
    lengths, num_image = torch.stack([keep_BL.sum(dim=1), (keep_BL & layout.image).sum(dim=1)]).tolist()
    if num_image == layout.num_image:
        return hidden_BLD, layout
    # A stable sort puts False before True: deleted rows move left, into the padding, and kept rows stay in order.
    order_BL = keep_BL.to(torch.int8).argsort(dim=1, stable=True)[:, -max(lengths) :]
    valid_BL = keep_BL.gather(1, order_BL)
    position_BL = valid_BL.cumsum(dim=1) - 1 if renumber else layout.position.gather(1, order_BL)
    kept = Layout(
        position=position_BL.masked_fill(~valid_BL, 0),
        end=valid_BL.sum(dim=1, keepdim=True) if renumber else layout.end,
        valid=valid_BL,
        image=layout.image.gather(1, order_BL) & valid_BL,
        lengths=lengths,
        num_image=num_image,
    )
    return hidden_BLD.gather(1, order_BL[:, :, None].expand(-1, -1, hidden_BLD.shape[-1])), kept
