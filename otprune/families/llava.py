"""LLaVA-1.5 and its kin: every picture is one square, and its patches are its visual tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options
from otprune.families.geometry import Color, Fit, Frame, Size, Span, Way, line_span
from otprune.shapes import VisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.llava_encoder import LlavaEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """The geometry of a model that sees one square of `side` pixels."""

    side: int
    num_tokens: int
    background: Color
    fit: Fit = "pad"
    axes: int = 1
    tiled: bool = False

    @property
    def fixed(self) -> int | None:
        return self.num_tokens

    @property
    def most_visual(self) -> int:
        return self.num_tokens

    @property
    def most_bytes(self) -> int:
        return 3 * self.side**2

    def shrunk(self, retention: float) -> None:
        return None

    def frame(self, size: Size) -> Frame:
        if min(size) * self.side < max(size):  # this check also bounds the memory of resizing
            raise ValueError(f"{size[1]} x {size[0]} is thinner than one pixel at {self.side} x {self.side}")
        return Frame(self.side, self.side, self.fit)

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        return self.num_tokens

    def grid(self, size: Size) -> tuple[int, int]:
        rows = int(self.num_tokens**0.5)  # with a class token among them, the tokens form no square
        return (rows, rows) if rows * rows == self.num_tokens else (0, 0)

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        return line_span(np.full(len(kept), image_token))


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a LLaVA-1.5.

    Raises:
        ValueError: for an option that takes pictures of free size.
    """
    check_fixed_size(options)
    vision = vision_shape(config)
    keeps_class_token = (
        config.vision_config.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
    )
    fit = "pad" if options.aspect == "auto" else options.aspect
    geometry = Square(
        side=vision.image_size,
        num_tokens=vision.num_patches + keeps_class_token,
        background=processor.color,
        fit=fit,
    )
    return Facts(geometry=geometry, options=Options(aspect=fit), vision=vision, image_token=config.image_token_index)


def check_fixed_size(options: Options) -> None:
    """Raises ValueError for options of pictures of free size, which this family's tower does not take."""
    if options.max_pixels is not None or options.min_pixels is not None:
        raise ValueError("model.max_pixels and model.min_pixels must be null: the tower sees squares of one size")


def vision_shape(config: Any) -> VisionShape:
    """The tower up to the layer that LLaVA reads."""
    layers, feature = config.vision_config.num_hidden_layers, config.vision_feature_layer
    # A negative hidden state counts from the end: state 0 is the embedding, so `layers` layers have layers + 1 states.
    deepest = max(f if f >= 0 else layers + 1 + f for f in ([feature] if isinstance(feature, int) else feature))
    return VisionShape.from_config(config.vision_config, layers=deepest)


def load_encoder(checkpoint: "Checkpoint", **place: Any) -> "LlavaEncoder":
    """The vision tower and the projector."""
    from otprune.models import llava_encoder  # imports torch

    return llava_encoder.load(checkpoint, **place)


def load_language_model(checkpoint: "Checkpoint", **place: Any) -> Any:
    """The language model alone."""
    from otprune.models.loading import load_causal_model  # imports torch

    return load_causal_model(checkpoint, **place)


LLAVA = Family(
    name="llava",
    title="LLaVA-1.5",
    architecture="LlavaForConditionalGeneration",
    read=read,
    load_encoder=load_encoder,
    load_language_model=load_language_model,
)
