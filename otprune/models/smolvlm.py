"""The first half of SmolVLM2 and Idefics3: tiles become visual tokens, by InternVL's pixel shuffle and one matrix."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from otprune.models.checkpoint import Checkpoint
from otprune.models.internvl import InternVLEncoder
from otprune.models.loading import fill, load_part, read_tensors
from otprune.shapes import VisionShape

VISION_PREFIX = r"^(model\.)?vision_model\."
CONNECTOR_PREFIX = r"^(model\.)?connector\.modality_projection\.proj\."


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attention: bool = False) -> InternVLEncoder:
    """Loads the vision tower and connector of a checkpoint, without reading the language model.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, as the tower has no class token.
    """
    if attention:
        raise ValueError(f"the attention of a class token is not computed for {checkpoint.record.title}")
    folder, vision = checkpoint.path, checkpoint.vision
    assert isinstance(vision, VisionShape)
    config: Any = AutoConfig.from_pretrained(folder)
    tower = load_part(AutoModel, folder, config.vision_config, {VISION_PREFIX: ""}, dtype)
    connector = nn.Linear(vision.width, checkpoint.row_width, bias=False, dtype=dtype)
    fill(connector, read_tensors(folder, CONNECTOR_PREFIX), folder)
    return InternVLEncoder(
        tower.to(device),
        connector.to(device).eval(),
        checkpoint.mean,
        checkpoint.std,
        merge=vision.merge,
        row_width=checkpoint.row_width,
        class_tokens=vision.class_tokens,
    )
