"""The first half of Mistral-Small-3: pictures of any size become visual tokens, by Pixtral's tower and a projector.

Shapes: B pictures of equal frames, H x W pixels of a frame, P patches of it, T tower width, N visual tokens of a
picture, D language width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from otprune.families.geometry import Size, Way
from otprune.models.checkpoint import Checkpoint
from otprune.models.encoder import Kept, Region
from otprune.models.llava_encoder import PROJECTOR_PREFIX
from otprune.models.loading import fill, load_part, read_tensors
from otprune.models.pixels import Normalize

VISION_PREFIX = r"^(model\.)?vision_tower\."


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attention: bool = False) -> "PixtralEncoder":
    """Loads the vision tower and projector of a checkpoint, without reading the language model.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, as the tower has no class token.
    """
    if attention:
        raise ValueError(f"the tower of {checkpoint.record.title} has no class token whose attention could be read")
    folder = checkpoint.path
    config: Any = AutoConfig.from_pretrained(folder)
    tower = load_part(AutoModel, folder, config.vision_config, {VISION_PREFIX: ""}, dtype)
    projector = Mistral3MultiModalProjector(config).to(dtype)
    fill(projector, read_tensors(folder, PROJECTOR_PREFIX), folder)
    return PixtralEncoder(
        tower.to(device),
        projector.to(device).eval(),
        checkpoint.mean,
        checkpoint.std,
        row_width=checkpoint.row_width,
    )


class PixtralEncoder(nn.Module):
    """Computes visual tokens of pictures of any size."""

    def __init__(
        self, tower: Any, projector: nn.Module, mean: Sequence[float], std: Sequence[float], *, row_width: int
    ):
        super().__init__()
        self.tower, self.projector = tower, projector
        self.row_width, self.dtype = row_width, tower.dtype
        self.normalize = Normalize(mean, std, tower.device)

    @torch.inference_mode()
    def regions(
        self, pictures: Sequence[Tensor], sizes: Sequence[Size], way: Way, *, before_projector: bool = False
    ) -> list[list[Region]]:
        """As of `Encoder`: one region a picture. Pictures of equal frames are one batch."""
        if before_projector:
            raise ValueError("the projector reads several patches as one: methods must choose behind it")
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            alike.setdefault(tuple(picture.shape), []).append(i)
        features: dict[int, Tensor] = {}
        for indices in alike.values():
            batch = torch.stack([pictures[i] for i in indices])
            features.update(zip(indices, self(batch), strict=True))
        return [[Region(features=features[i])] for i in range(len(pictures))]

    def join(self, size: Size, regions: Sequence[Kept], way: Way, *, before_projector: bool = False) -> Kept:
        """As of `Encoder`."""
        (kept,) = regions
        return kept

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Visual tokens [B, N, D], in the encoder's dtype on its device, from uint8 pixels [B, H, W, 3] anywhere."""
        pixels = self.normalize(pixels).to(self.dtype)
        hidden = self.see(pixels)
        frames = [tuple(pixels.shape[-2:])] * len(pixels)
        return self.projector(hidden.flatten(0, 1), frames).unflatten(0, (len(pixels), -1))

    def see(self, pixels: Tensor) -> Tensor:
        """The tower's output [B, P, T], patches in raster order, from normalised pixels [B, 3, H, W].

        transformers' `PixtralVisionModel.forward` packs all pictures into one sequence and masks each from the others:
        its mask and its work grow with the square of the batch. As batches, pictures are apart without a mask, so that
        the fused kernels without one can run.
        """
        embedded = self.tower.patch_conv(pixels)
        rows, columns = embedded.shape[-2:]
        hidden = self.tower.ln_pre(embedded.flatten(2).mT)
        places = torch.cartesian_prod(
            torch.arange(rows, device=pixels.device), torch.arange(columns, device=pixels.device)
        )
        rotations = self.tower.patch_positional_embedding(hidden, places)
        return self.tower.transformer(hidden, attention_mask=None, position_embeddings=rotations).last_hidden_state
