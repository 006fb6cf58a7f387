"""The two halves of Qwen2.5-VL, Qwen3-VL and Qwen3.5: vision tower with mergers, and language model with its head.

Shapes: N visual tokens of a picture, P patches of it (4 to a token), D language width, B prompts, L rows of a prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.modeling_outputs import CausalLMOutputWithPast

from otprune.families.geometry import Size, Way
from otprune.models.checkpoint import Checkpoint
from otprune.models.encoder import Kept, Region
from otprune.models.loading import load_part
from otprune.models.packed_attention import pack_attention
from otprune.models.pixels import Normalize

VISION_PREFIX = r"^(model\.)?visual\."


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attention: bool = False) -> "QwenEncoder":
    """Loads the vision tower and its mergers, without reading the language model.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, as the tower has no class token.
    """
    if attention:
        raise ValueError(f"the tower of {checkpoint.record.title} has no class token whose attention could be read")
    config: Any = AutoConfig.from_pretrained(checkpoint.path)
    tower = load_part(AutoModel, checkpoint.path, config.vision_config, {VISION_PREFIX: ""}, dtype)
    return QwenEncoder(tower.to(device), checkpoint.mean, checkpoint.std, row_width=checkpoint.row_width)


class QwenEncoder(nn.Module):
    """Computes visual tokens of pictures of any size."""

    def __init__(self, tower: Any, mean: Sequence[float], std: Sequence[float], *, row_width: int):
        super().__init__()
        self.tower, self.row_width, self.dtype = tower, row_width, tower.dtype
        self.segments = pack_attention(tower)
        config = tower.config
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        self.normalize = Normalize(mean, std, tower.device)

    @torch.inference_mode()
    def regions(
        self, pictures: Sequence[Tensor], sizes: Sequence[Size], way: Way, *, before_projector: bool = False
    ) -> list[list[Region]]:
        """As of `Encoder`: one region a picture. The tower reads all pictures at once, each by itself."""
        if before_projector:
            raise ValueError("the tokens before the mergers are no visual tokens: methods must choose behind them")
        patches = torch.cat([self.patchify(picture) for picture in pictures])
        grids = [(1, picture.shape[0] // self.patch, picture.shape[1] // self.patch) for picture in pictures]
        try:
            seen = self.tower(patches, grid_thw=torch.tensor(grids, device=patches.device))
        finally:
            self.segments.forget()
        counts = [rows * columns // self.merge**2 for _, rows, columns in grids]
        levels: list[Tensor] = getattr(seen, "deepstack_features", None) or []
        features = seen.pooler_output.split(counts)
        if not levels:
            return [[Region(features=tokens)] for tokens in features]
        rows = torch.cat([seen.pooler_output, *levels], dim=-1).split(counts)
        return [[Region(features=tokens, rows=row)] for tokens, row in zip(features, rows, strict=True)]

    def join(self, size: Size, regions: Sequence[Kept], way: Way, *, before_projector: bool = False) -> Kept:
        """As of `Encoder`."""
        (kept,) = regions
        return kept

    def patchify(self, picture: Tensor) -> Tensor:
        """The patches [P, 3 * frames * side * side] of a frame uint8 [H, W, 3], normalised, in the encoder's dtype.

        The four patches of a token stand together, tokens in raster order. Within a patch the channel comes first, then
        the frame, row and column; a picture is a video whose `frames` frames are equal.
        """
        pixels = self.normalize(picture).to(self.dtype)
        side, merge = self.patch, self.merge
        token_rows, token_columns = picture.shape[0] // (side * merge), picture.shape[1] // (side * merge)
        cut = pixels.reshape(3, token_rows, merge, side, token_columns, merge, side)
        patches = cut.permute(1, 4, 2, 5, 0, 3, 6)  # token row, token column, patch row, patch column, channel, y, x
        patches = patches[..., None, :, :].expand(*patches.shape[:5], self.frames, side, side)
        return patches.reshape(token_rows * token_columns * merge**2, -1)


def load_language_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> "LanguageHalf":
    """The language model with its head, in eval mode. Of the tower, only the small parts around its layers are read.

    transformers knows how each version of the families names and lays out its weights by the class of the whole model
    alone. So this class is built around a tower without layers, which is then dropped.

    Raises:
        CheckpointError: if weights are missing.
    """
    config: Any = AutoConfig.from_pretrained(checkpoint.path)
    config.vision_config.depth = 0
    if checkpoint.levels:
        config.vision_config.deepstack_visual_indexes = []
    whole = load_part(AutoModelForImageTextToText, checkpoint.path, config, {}, dtype)
    return LanguageHalf(whole).to(device).eval()


class LanguageHalf(nn.Module):
    """The language model of a whole model, which acts like a causal language model of transformers."""

    def __init__(self, whole: Any):
        super().__init__()
        self.model, self.lm_head = whole.model.language_model, whole.lm_head
        self.config, self.generation_config = self.model.config, whole.generation_config

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, *, logits_to_keep: int = 0, **inputs: Any) -> CausalLMOutputWithPast:
        """Logits [B, logits_to_keep, V] of the last rows; 0 keeps all L rows.

        `inputs` are those of transformers' language model: inputs_embeds [B, L, D] or input_ids [B, L], attention_mask,
        position_ids int64 [3, B, L], past_key_values and use_cache. For DeepStack: visual_pos_masks, bool [B, L], and
        deepstack_visual_embeds, of each level the rows [visual tokens of the batch, D].
        """
        output = self.model(**inputs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
