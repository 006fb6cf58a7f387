"""LLaVA-1.5 and its kin: every picture is one square, and its patches are its visual tokens.

The kin are all checkpoints of transformers' `LlavaForConditionalGeneration` with a CLIP or SigLIP tower, whatever their
language model: JoyCaption (SigLIP, Llama 3.1), LLaVA-Interleave (SigLIP, Qwen2), BakLLaVA (CLIP, Mistral). A SigLIP
tower has no class token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options
from otprune.families.geometry import Color, Filter, Fit, Frame, Size, Span, Way, line_span
from otprune.shapes import VisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.methods import Method
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.llava_encoder import LlavaEncoder

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""`model_type` of the towers that run here -> their class tokens, which stand before the patches."""


def check_side(side: int) -> None:
    """Raises ValueError for a side of a square that no picture could fill."""
    if side < 1:
        raise ValueError(f"the side of the model's pictures must be at least 1 pixel, got {side}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """The geometry of a model that sees one square of `side` pixels."""

    side: int
    num_tokens: int
    background: Color
    fit: Fit = "pad"
    resample: Filter = "bicubic"
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

    def __post_init__(self) -> None:
        check_side(self.side)

    def frame(self, size: Size) -> Frame:
        if min(size) * self.side < max(size):  # this check also bounds the memory of resizing
            raise ValueError(f"{size[1]} x {size[0]} is thinner than one pixel at {self.side} x {self.side}")
        return Frame(self.side, self.side, self.fit, self.resample)

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        return self.num_tokens

    def grid(self, size: Size) -> tuple[int, int]:
        rows = int(self.num_tokens**0.5)  # with a class token among them, the tokens form no square
        return (rows, rows) if rows * rows == self.num_tokens else (0, 0)

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        return line_span(np.full(len(kept), image_token))


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a LLaVA.

    Raises:
        ValueError: for a tower without a fixed grid of patches, or an option that takes pictures of free size.
    """
    check_fixed_size(options)
    vision = vision_shape(config)
    # The strategy "default" drops the first position, even of a tower without class token.
    dropped = config.vision_feature_select_strategy == "default"
    fit = own_fit(processor.settings) if options.aspect == "auto" else options.aspect
    geometry = Square(
        side=vision.image_size,
        num_tokens=vision.num_patches + vision.class_tokens - dropped,
        background=processor.color,
        fit=fit,
        resample=FILTERS.get(processor.settings.get("resample"), "bicubic") if fit == "stretch" else "bicubic",
    )
    return Facts(
        geometry=geometry,
        options=Options(aspect=fit),
        vision=vision,
        image_token=config.image_token_index,
        class_attention=has_class_attention(config),
    )


FILTERS: Mapping[Any, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters, as image processors store them."""


def own_fit(settings: Mapping[str, Any]) -> Literal["pad", "stretch"]:
    """How a checkpoint's pictures become squares, by the stored settings of its image processor.

    A processor that neither crops nor pads (SigLIP's) stretches: `stretch`. Every other one means `pad`, also without
    stored settings. CLIP's processor, which the released LLaVA-1.5 checkpoints hold, crops the centre, yet LLaVA was
    trained with padding and every published number rests on padding.
    """
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIP"
    crops, pads = settings.get("do_center_crop"), settings.get("do_pad")
    if crops is None:
        crops = kind.startswith(("CLIP", "Llava"))  # what these classes do unless told otherwise
    return "pad" if crops or pads else "stretch"


def check_fixed_size(options: Options) -> None:
    """Raises ValueError for options of pictures of free size or number of tiles, which this family does not take."""
    check_no_tiles(options)
    if options.max_pixels is not None or options.min_pixels is not None:
        raise ValueError("model.max_pixels and model.min_pixels must be null: the tower sees squares of one size")


def check_no_tiles(options: Options) -> None:
    """Raises ValueError for a number of tiles, in families where it cannot be chosen."""
    if options.max_tiles is not None:
        raise ValueError(
            "model.max_tiles must be null: the number of tiles can be chosen for InternVL and SmolVLM alone"
        )


def vision_shape(config: Any) -> VisionShape:
    """The tower up to the layer that LLaVA reads.

    Raises:
        ValueError: for a tower that is neither CLIP's nor SigLIP's.
    """
    kind = config.vision_config.model_type
    if kind not in CLASS_TOKENS:
        raise ValueError(
            f"vision_config.model_type must be {' or '.join(CLASS_TOKENS)}, towers that see squares of one size, "
            f"got {kind!r}"
        )
    read = feature_layers(config)
    return VisionShape.from_config(
        config.vision_config, layers=max(read), class_tokens=CLASS_TOKENS[kind], feature_layers=len(read)
    )


def feature_layers(config: Any) -> list[int]:
    """The hidden states that the projector reads, counted from the embedding, which is 0."""
    layers, feature = config.vision_config.num_hidden_layers, config.vision_feature_layer
    # A negative hidden state counts from the end: state 0 is the embedding, so `layers` layers have layers + 1 states.
    return [f if f >= 0 else layers + 1 + f for f in ([feature] if isinstance(feature, int) else feature)]


def has_class_attention(config: Any) -> bool:
    """Whether a layer of the tower reads a class token together with exactly the patches that the projector reads."""
    return (
        CLASS_TOKENS[config.vision_config.model_type] > 0
        and config.vision_feature_select_strategy == "default"
        and isinstance(config.vision_feature_layer, int)
        and feature_layers(config)[0] < config.vision_config.num_hidden_layers
    )


def refuses(method: "Method", checkpoint: "Checkpoint", settings: Mapping[str, Any] | None = None) -> str | None:
    """Methods that read what the checkpoint's tower does not have.

    Args:
        settings: the method's own, for what depends on them; None leaves that unchecked.
    """
    if "class_attention" in method.requires and not checkpoint.class_attention:
        return (
            f"method {method.name} reads the attention of a class token in the vision layer behind the features, which "
            f"{checkpoint.name} does not have: it needs a CLIP tower, one vision_feature_layer before the last, and "
            "vision_feature_select_strategy 'default'"
        )
    vision = checkpoint.vision
    assert isinstance(vision, VisionShape), "the tower of this family sees squares"
    by_clip = "relevance" in method.requires and settings is not None and settings.get("relevance") == "clip"
    if by_clip and not vision.class_tokens:
        return (
            f"method {method.name} with settings.relevance=clip needs a CLIP tower, which {checkpoint.name} does not "
            "have; settings.relevance=words compares with the language model's word embeddings instead"
        )
    square = (vision.image_size, vision.image_size)
    if method.keeps_grid and not method.keeps_all and checkpoint.geometry.grid(square) == (0, 0):
        return (
            f"method {method.name} pools a square grid of tokens, but {checkpoint.name} has "
            f"{checkpoint.geometry.most_visual} tokens, which form none"
        )
    return None


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
    refuses=refuses,
)
