"""The first half of InternVL: tiles become visual tokens.

Shapes: B tiles, H pixels a side, P patches of a tile, N visual tokens of a tile, W tower width, D language width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from otprune.families.geometry import Size, Way
from otprune.models.checkpoint import Checkpoint
from otprune.models.encoder import Kept, Region
from otprune.models.llava_encoder import PROJECTOR_PREFIX, join_crops
from otprune.models.loading import fill, load_part, read_tensors
from otprune.models.pixels import Normalize

VISION_PREFIX = r"^(model\.)?vision_tower\."


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attention: bool = False) -> "InternVLEncoder":
    """Loads the vision tower and projector of a checkpoint, without reading the language model.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, as the class token's attention is not computed for this family.
    """
    if attention:
        raise ValueError(f"the attention of a class token is not computed for {checkpoint.record.title}")
    folder = checkpoint.path
    config: Any = AutoConfig.from_pretrained(folder)
    tower = load_part(AutoModel, folder, config.vision_config, {VISION_PREFIX: ""}, dtype)
    projector = InternVLMultiModalProjector(config).to(dtype)
    fill(projector, read_tensors(folder, PROJECTOR_PREFIX), folder)
    return InternVLEncoder(
        tower.to(device),
        projector.to(device).eval(),
        checkpoint.mean,
        checkpoint.std,
        merge=round(1 / config.downsample_ratio),
        row_width=checkpoint.row_width,
    )


class InternVLEncoder(nn.Module):
    """Computes visual tokens of tiles."""

    def __init__(
        self,
        tower: Any,
        projector: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        merge: int,
        row_width: int,
        class_tokens: int = 1,
    ):
        super().__init__()
        self.tower, self.projector = tower, projector
        self.merge, self.row_width, self.dtype = merge, row_width, tower.dtype
        self.class_tokens = class_tokens
        self.normalize = Normalize(mean, std, tower.device)

    @torch.inference_mode()
    def regions(
        self, pictures: Sequence[Tensor], sizes: Sequence[Size], way: Way, *, before_projector: bool = False
    ) -> list[list[Region]]:
        """As of `Encoder`: all tokens of a picture, or those of each of its crops."""
        if before_projector:
            raise ValueError("the projector reads several patches as one: methods must choose behind it")
        counts = [1 if picture.dim() == 3 else len(picture) for picture in pictures]
        crops = torch.cat([picture.reshape(-1, *picture.shape[-3:]) for picture in pictures])
        features = self(crops).split(counts)
        if way == "joint":
            return [[Region(features=tokens.flatten(0, 1))] for tokens in features]
        return [[Region(features=crop) for crop in tokens] for tokens in features]

    def join(self, size: Size, regions: Sequence[Kept], way: Way, *, before_projector: bool = False) -> Kept:
        """As of `Encoder`."""
        return join_crops(regions)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Visual tokens [B, N, D], in the encoder's dtype on its device, from uint8 pixels [B, H, H, 3] anywhere."""
        hidden = self.tower(self.normalize(pixels).to(self.dtype)).last_hidden_state
        return self.projector(self.shuffle(hidden[:, self.class_tokens :]))  # class tokens come first

    def shuffle(self, patches: Tensor) -> Tensor:
        """[B, N, merge * merge * W] from patches [B, P, W] in raster order: those of a token one behind the other.

        This is the pixel shuffle of transformers' `InternVLModel`; N = P / (merge * merge), in raster order too.
        """
        side = round(patches.shape[1] ** 0.5) // self.merge
        cut = patches.reshape(len(patches), side, self.merge, side, self.merge, -1)
        return cut.transpose(2, 3).reshape(len(patches), side * side, -1)
