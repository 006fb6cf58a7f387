"""What computes: only these files and `otprune.families` know the internals of a model.

The two halves of a model load separately, so that an actor holds only the half that it runs: an encoder (vision tower
and projector) and a decoder (language model and tokenizer).
"""

from pathlib import Path
from typing import Any

import torch

from otprune.models.checkpoint import Checkpoint, CheckpointError, read_checkpoint, resolve_checkpoint, weights_digest
from otprune.models.decoder import Decoder, load_decoder
from otprune.models.encoder import Encoder, Kept, Region
from otprune.models.loading import check_weights
from otprune.models.prompts import Completion, Prompt, Prompter, load_prompter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Completion",
    "Decoder",
    "Encoder",
    "Kept",
    "Prompt",
    "Prompter",
    "Region",
    "check_weights",
    "load_decoder",
    "load_encoder",
    "load_prompter",
    "read_checkpoint",
    "resolve_checkpoint",
    "weights_digest",
]


def load_encoder(
    checkpoint: Checkpoint | Path, *, dtype: torch.dtype, device: str, attention: bool = False, saliency: bool = False
) -> Encoder:
    """Loads the vision tower and projector of a checkpoint, without reading the language model.

    Args:
        checkpoint: as read already, or its folder.
        attention: also compute the class token's attention, for the methods that require it.
        saliency: also compute the saliency of each token, if the tower has a class token.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, if the tower has no class token or no layer behind its features.
    """
    if isinstance(checkpoint, Path):
        checkpoint = read_checkpoint(str(checkpoint))
    place: dict[str, Any] = {"dtype": dtype, "device": device, "attention": attention}
    if saliency and checkpoint.class_attention:
        place["saliency"] = True
    return checkpoint.record.load_encoder(checkpoint, **place)
