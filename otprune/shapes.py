"""Sizes of the models whose multiply-adds `otprune.flops` counts: plain numbers, no weights.

`from_config` reads a shape from any object with the attributes of a Hugging Face config, so this module needs no
transformers. `MODELS` holds the shapes of the four models of the published tables.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """The sizes of the linear-attention layers of a hybrid model: gated delta nets, as Qwen3.5 has them."""

    layers: tuple[int, ...]
    """Which layers, counted from 0; the others attend to every token."""
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    kernel: int
    """Width of the short convolution over queries, keys and values, in tokens."""

    @classmethod
    def from_config(cls, config: Any) -> "LinearShape | None":
        """The shape in a text config; None if all its layers attend to every token."""
        kinds = getattr(config, "layer_types", None) or ()
        if "linear_attention" not in kinds:
            return None
        return cls(
            layers=tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention"),
            key_heads=config.linear_num_key_heads,
            key_dim=config.linear_key_head_dim,
            value_heads=config.linear_num_value_heads,
            value_dim=config.linear_value_head_dim,
            kernel=config.linear_conv_kernel_dim,
        )


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """The sizes of a decoder-only language model with gated FFNs (LLaMA, Qwen, Mistral)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    """Experts of each FFN, of which a router chooses some for each token; `intermediate` is then the width of those
    together. A further expert that serves every token is one of them and in that width, as a gate weighs it too. 0: no
    experts."""
    linear: LinearShape | None = None
    """The layers with linear attention; None: there are none. With them, the other layers gate their attention: the
    projection of the queries is twice as wide."""

    @classmethod
    def from_config(cls, config: Any) -> "LanguageShape":
        """The shape in a text config (`hidden_size`, `intermediate_size`, `num_hidden_layers`, ...).

        A config without `num_key_value_heads` or `head_dim` means multi-head attention of full width. With experts,
        every layer is taken to have them.
        """
        heads = config.num_attention_heads
        chosen = getattr(config, "num_experts_per_tok", None) or 0
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        return cls(
            hidden=config.hidden_size,
            intermediate=chosen * config.moe_intermediate_size + shared if chosen else config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            experts=config.num_experts + bool(shared) if chosen else 0,
            linear=LinearShape.from_config(config),
        )


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The sizes of a plain ViT with two-matrix FFNs (CLIP, SigLIP, InternViT); `layers` counts the layers that run."""

    hidden: int
    intermediate: int
    layers: int
    image_size: int
    patch_size: int
    class_tokens: int = 1
    feature_layers: int = 1  # whose states the projector reads side by side
    merge: int = 1  # the projector reads merge x merge patches as one
    averaged: bool = False  # the projector reads the mean of the merged patches, instead of all of them
    projector_matrices: int = 2  # each but the first is as wide as the language model on both sides

    @classmethod
    def from_config(
        cls, config: Any, *, layers: int | None = None, class_tokens: int = 1, feature_layers: int = 1
    ) -> "VisionShape":
        """The shape in a vision config; `layers` None counts every layer of the config.

        LLaVA reads hidden state -2. For an encoder that stops there, pass the smaller number of layers.
        """
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers if layers is None else layers,
            image_size=config.image_size,
            patch_size=config.patch_size,
            class_tokens=class_tokens,
            feature_layers=feature_layers,
        )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Visual tokens that the projector makes."""
        return self.num_patches // self.merge**2

    @property
    def width(self) -> int:
        """Numbers that the projector reads for a visual token."""
        return self.hidden * self.feature_layers * (1 if self.averaged else self.merge**2)


@dataclass(frozen=True, kw_only=True)
class PatchVisionShape:
    """The sizes of a ViT for pictures of any size, and of the mergers that make visual tokens of its patches."""

    hidden: int
    intermediate: int
    layers: int
    ffn_matrices: int
    """3 in gated FFNs, else 2."""
    patch_size: int
    frames: int
    """Copies of a picture that the patch embedding reads: a video's frames of one token."""
    merge: int
    """A visual token is made of merge x merge patches."""
    out: int
    """Width of a visual token."""
    mergers: int = 1
    """MLPs that make tokens: the last one, and one for each DeepStack level."""
    inner: tuple[int, ...] = ()
    """Widths between an MLP's layers; (): it has two layers, and the width between them is that of merged patches."""
    window: int = 0
    """Side of an attention window in visual tokens; 0: no windows."""
    window_layers: int = 0
    """Layers that attend inside windows alone."""

    @classmethod
    def from_config(cls, config: Any, *, mergers: int = 1) -> "PatchVisionShape":
        """The shape in the vision config of a Qwen2.5-VL, whose FFNs are gated and which has windows, or a Qwen3-VL."""
        window = getattr(config, "window_size", 0)
        full = len({layer for layer in getattr(config, "fullatt_block_indexes", ()) if layer < config.depth})
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.depth,
            ffn_matrices=3 if window else 2,
            patch_size=config.patch_size,
            frames=config.temporal_patch_size,
            merge=config.spatial_merge_size,
            out=config.out_hidden_size,
            mergers=mergers,
            window=window // config.patch_size // config.spatial_merge_size,
            window_layers=config.depth - full if window else 0,
        )


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model: vision tower with what makes visual tokens of its output, and language model.

    Behind a `VisionShape` stands LLaVA's two-layer MLP projector (vision -> hidden -> hidden), or its
    `projector_matrices`.
    """

    vision: VisionShape | PatchVisionShape
    language: LanguageShape


def _llava(hidden: int, intermediate: int, layers: int) -> ModelShape:
    # Vicuna's heads are 128 wide. 32,064 is the padded vocabulary of the checkpoints in transformers' format.
    heads = hidden // 128
    language = LanguageShape(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        vocab=32064,
    )
    # CLIP ViT-L/14-336. LLaVA reads hidden state -2, yet the released models run all 24 layers.
    vision = VisionShape(hidden=1024, intermediate=4096, layers=24, image_size=336, patch_size=14)
    return ModelShape(vision=vision, language=language)


MODELS = {
    "llava-1.5-7b": _llava(4096, 11008, 32),
    "llava-1.5-13b": _llava(5120, 13824, 40),
    "llava-1.6-7b": _llava(4096, 11008, 32),
    "llava-next-video-7b": _llava(4096, 11008, 32),
}
"""The models of the published tables, by the name used in `otprune.flops.paper_table`."""
