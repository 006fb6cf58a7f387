"""What a caller gives to vLLM: the fields of a prompt's pictures, and the engine's arguments. Imports no vLLM."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otprune.families.geometry import Span
from otprune.vllm.architectures import span_name
from otprune.vllm.fields import AXES


def image_fields(rows: Sequence[Tensor], spans: Sequence[Span], axes: int) -> dict[str, Tensor]:
    """The value of `multi_modal_data["image"]` for the pictures of one prompt, in their order in it (`fields`).

    Args:
        rows: float [K, W] of each picture, one row for each image token of its span.
        spans: the picture's span; its positions are [axes, L].
        axes: axes of the model's positions: 1, or 3 with M-RoPE.

    Raises:
        ValueError: if there is no picture, or if rows or spans do not fit each other.
    """
    if not rows or len(rows) != len(spans):
        raise ValueError(f"each picture must have rows and a span, got {len(rows)} and {len(spans)}")
    if axes not in (1, AXES):
        raise ValueError(f"axes must be 1 or {AXES}, got {axes}")
    if len(widths := {tuple(each.shape[1:]) for each in rows}) > 1:
        raise ValueError(f"rows of all pictures must have the same width, got {sorted(widths)}")
    for span in spans:
        if span.positions.shape != (axes, len(span)):
            raise ValueError(f"positions of a span must be [{axes}, {len(span)}], got {list(span.positions.shape)}")
    fields = {
        "image_embeds": torch.cat(list(rows)),
        "image_rows": torch.tensor([len(each) for each in rows]),
        "image_tokens": _tensor([span.tokens for span in spans]),
        "image_lengths": torch.tensor([len(span) for span in spans]),
    }
    if axes == AXES:
        fields["image_positions"] = _tensor([span.positions.T for span in spans])
        fields["image_extents"] = torch.tensor([span.extent for span in spans])
    return fields


def engine_arguments(architecture: str) -> dict[str, Any]:
    """Arguments of vLLM's engine for a checkpoint of this architecture (`architectures` in its config.json).

    Raises:
        ValueError: if no class takes spans for this architecture.
    """
    return {
        "hf_overrides": {"architectures": [span_name(architecture)]},
        "enable_mm_embeds": True,
        # Pictures and videos share a tower. With a limit above 0 for either, vLLM would load it.
        "limit_mm_per_prompt": {"image": 0, "video": 0},
    }


def _tensor(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
