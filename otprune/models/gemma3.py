"""The two halves of Gemma 3: tower with projector, and the language model with its masks.

Shapes: B prompts, L rows of a prompt, P patches of a picture, T tower width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from otprune.layerwise.layout import causal_mask
from otprune.models.checkpoint import Checkpoint
from otprune.models.internvl import InternVLEncoder
from otprune.models.llava_encoder import PROJECTOR_PREFIX, VISION_PREFIX, has_inner_vision_model
from otprune.models.loading import fill, load_causal_model, load_part, read_tensors


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attention: bool = False) -> InternVLEncoder:
    """Loads the vision tower and projector of a checkpoint, without reading the language model.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, as the tower has no class token.
    """
    if attention:
        raise ValueError(f"the tower of {checkpoint.record.title} has no class token whose attention could be read")
    folder = checkpoint.path
    config: Any = AutoConfig.from_pretrained(folder)
    config.vision_config.vision_use_head = False  # Gemma does not read the pooled output
    inner = "vision_model." if has_inner_vision_model(config.vision_config) else ""
    tower = load_part(AutoModel, folder, config.vision_config, {VISION_PREFIX: inner}, dtype)
    projector = Gemma3MultiModalProjector(config).to(dtype)
    fill(projector, read_tensors(folder, PROJECTOR_PREFIX), folder)
    return InternVLEncoder(
        tower.to(device),
        projector.to(device).eval(),
        checkpoint.mean,
        checkpoint.std,
        merge=1,  # the projector itself makes one token of several patches
        row_width=checkpoint.row_width,
        class_tokens=0,
    )


def load_language_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> "LanguageModel":
    """The language model with its head, in eval mode.

    Raises:
        CheckpointError: if weights are missing.
    """
    return LanguageModel(load_causal_model(checkpoint, dtype=dtype, device=device)).eval()


class LanguageModel(nn.Module):
    """A causal language model whose rows of one picture attend to each other in both directions."""

    def __init__(self, causal: Any):
        super().__init__()
        self.causal, self.config, self.generation_config = causal, causal.config, causal.generation_config

    @property
    def device(self) -> torch.device:
        return self.causal.device

    def get_input_embeddings(self) -> nn.Module:
        """The text embedding, which scales its rows by the root of their width. Pictures' rows are not scaled."""
        return self.causal.get_input_embeddings()

    def forward(self, *, pictures: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """As transformers' causal language model.

        Args:
            pictures: int64 [B, L], n for rows of the n-th picture of a prompt, counted from 1, and 0 for all others.
                A whole prompt gets it; later words, which are text, do not.
            attention_mask: of a prompt [B, L], 1 for tokens and 0 for padding, or the causal mask [B, 1, L, L] of a
                left-padded one; None without padding.
        """
        if pictures is None:
            return self.causal(attention_mask=attention_mask, **inputs)
        valid = torch.ones_like(pictures) if attention_mask is None else attention_mask
        if valid.dim() == 4:
            valid = valid[:, 0, -1]  # the last row is a token, and sees all tokens
        return self.causal(attention_mask=masks(pictures, valid.bool(), self.config.sliding_window), **inputs)


def masks(pictures: Tensor, valid: Tensor, window: int) -> dict[str, Tensor]:
    """For each kind of layer the mask of a prompt, bool [B, 1, L, L], True where row i may attend to row j.

    Row i attends to the rows up to itself, and to all of its own picture. In layers with a window it attends to none
    that is `window` rows or more before it; the window does not limit what it sees of its picture behind itself.

    Args:
        pictures: as of `LanguageModel.forward`.
        valid: bool [B, L], False for padding.
    """
    same_picture = (pictures[:, :, None] == pictures[:, None]) & (pictures > 0)[:, None]
    full = causal_mask(valid) | same_picture[:, None]
    place = torch.arange(pictures.shape[1], device=pictures.device)
    return {"full_attention": full, "sliding_attention": full & (place[:, None] - place < window)}
