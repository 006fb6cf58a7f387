"""The first half of the LLaVAs: pictures become visual tokens, with what some methods need from the tower.

Shapes: B crops, H pixels a side, P positions of the tower (class token and patches), N visual tokens of a crop, W tower
width (the sum over all feature layers), D language width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from otprune.anyres import pack_tiles
from otprune.families.geometry import Geometry, Size, Way
from otprune.families.llava import feature_layers, has_class_attention
from otprune.families.llava_next import Tiled
from otprune.models.checkpoint import Checkpoint, CheckpointError
from otprune.models.encoder import Kept, Region
from otprune.models.loading import fill, load_part, read_tensors
from otprune.models.pixels import Normalize

VISION_PREFIX = r"^(model\.)?vision_tower\.(vision_model\.)?"
NEWLINE = r"^(model\.)?image_newline$"
PROJECTOR_PREFIX = r"^(model\.)?multi_modal_projector\."


def load(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, attention: bool = False, saliency: bool = False
) -> "LlavaEncoder":
    """Loads the vision tower and projector of a checkpoint, without reading the language model.

    Args:
        attention: keep the layer that `class_attention` needs; else it is cut off.
        saliency: remember what `saliency` needs.

    Raises:
        CheckpointError: if weights are missing.
        ValueError: with `attention`, if the tower has no class token or no layer behind its features.
    """
    folder = checkpoint.path
    config: Any = AutoConfig.from_pretrained(folder)
    if config.vision_config.model_type == "siglip_vision_model":
        config.vision_config.vision_use_head = False  # LLaVA does not read the pooled output
    inner = "vision_model." if has_inner_vision_model(config.vision_config) else ""
    tower = load_part(AutoModel, folder, config.vision_config, {VISION_PREFIX: inner}, dtype)
    projector = LlavaMultiModalProjector(config).to(dtype)
    fill(projector, read_tensors(folder, PROJECTOR_PREFIX), folder)
    encoder = LlavaEncoder(
        config,
        tower.to(device),
        projector.to(device).eval(),
        checkpoint.mean,
        checkpoint.std,
        geometry=checkpoint.geometry,
        attention=attention,
        saliency=saliency,
    )
    if isinstance(checkpoint.geometry, Tiled):
        newlines = read_tensors(folder, NEWLINE)
        if not newlines:
            raise CheckpointError(f"model.path must hold the weight image_newline, found none in {folder}")
        encoder.newline = next(iter(newlines.values())).to(device, dtype)
    return encoder


class LlavaEncoder(nn.Module):
    """Computes projected visual tokens [B, N, D] from uint8 pixels [B, H, H, 3]."""

    newline: Tensor | None = None
    """The learned token [D] that ends each row of tiles; None in LLaVA-1.5."""

    def __init__(
        self,
        config: Any,
        tower: PreTrainedModel,
        projector: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        geometry: Geometry,
        attention: bool = False,
        saliency: bool = False,
    ):
        super().__init__()
        self.tower, self.projector, self.geometry = tower, projector, geometry
        self.layer = config.vision_feature_layer
        self.drops_first = config.vision_feature_select_strategy == "default"
        # The cut below removes the reader from the tower. `Any`, because the parts of a CLIPEncoderLayer are untyped.
        self.reader: Any = _layer_behind(_transformer(tower), config) if attention else None
        if isinstance(self.layer, int):
            _cut_after(_transformer(tower), self.layer)
        self.entering: list[Tensor] | None = [] if saliency else None
        if saliency:
            last: Any = _transformer(tower).encoder.layers[-1]
            last.register_forward_pre_hook(self._remember, with_kwargs=True)
        # CLIP's positions include the class token. The strategy "default" drops the first, even of SigLIP's patches.
        num_positions = _transformer(tower).embeddings.position_embedding.weight.shape[0]
        self.num_tokens: int = num_positions - 1 if self.drops_first else num_positions
        self.row_width: int = config.text_config.hidden_size
        self.normalize = Normalize(mean, std, tower.device)
        self.dtype = tower.dtype

    @torch.inference_mode()
    def regions(
        self, pictures: Sequence[Tensor], sizes: Sequence[Size], way: Way, *, before_projector: bool = False
    ) -> list[list[Region]]:
        """As of `Encoder`: the square itself, the packed sequence of a picture in crops, or each of its crops."""
        counts = [1 if picture.dim() == 3 else len(picture) for picture in pictures]
        crops = torch.cat([picture.reshape(-1, *picture.shape[-3:]) for picture in pictures])
        hidden = self.see(crops)
        patches = self.patches(hidden)
        features = patches if before_projector else self.project(patches)
        if way == "joint" and isinstance(self.geometry, Tiled):
            packed = zip(features.split(counts), sizes, strict=True)
            return [[Region(features=self._pack(crops, size))] for crops, size in packed]
        attention, keys = self.class_attention(hidden) if self.reader is not None else (None, None)
        saliency = self.saliency() if self.entering is not None else None
        regions = iter(
            Region(
                features=features[i],
                patches=patches[i],
                keys=None if keys is None else keys[i],
                class_attention=None if attention is None else attention[i],
                saliency=None if saliency is None else saliency[i],
            )
            for i in range(len(crops))
        )
        return [[next(regions) for _ in range(count)] for count in counts]

    @torch.inference_mode()
    def join(self, size: Size, regions: Sequence[Kept], way: Way, *, before_projector: bool = False) -> Kept:
        """As of `Encoder`."""
        if before_projector:
            regions = [Kept(self.project(kept.tokens), kept.source, kept.num_visual) for kept in regions]
        if not isinstance(self.geometry, Tiled) or way == "joint":
            (kept,) = regions
            return kept
        if way == "tiles":
            return self._in_raster_order(join_crops(regions), size)
        tokens = self._pack(torch.stack([kept.tokens for kept in regions]), size)
        num_visual = self.geometry.num_visual(size)
        whole = len(tokens) == num_visual  # squares that were not pooled hold every token in its place
        return Kept(tokens, torch.arange(num_visual) if whole else torch.full((len(tokens),), -1), num_visual)

    def _in_raster_order(self, kept: Kept, size: Size) -> Kept:
        """The tokens of the overview, then those of all tiles in the raster order of the whole picture.

        Where some were made of several and have no place of their own, all stay with their crops.
        """
        assert isinstance(self.geometry, Tiled)
        source = kept.source.cpu()
        if (source < 0).any():
            return kept
        order = torch.from_numpy(self.geometry.raster_order(size, source.numpy())).to(kept.source.device)
        return Kept(kept.tokens[order], kept.source[order], kept.num_visual)

    def _pack(self, crops_TND: Tensor, size: Size) -> Tensor:
        """The tokens [K, D] of a picture in the model's order: overview, then the rows of tiles with newline tokens."""
        assert isinstance(self.geometry, Tiled)
        assert self.newline is not None
        frame = self.geometry.frame(size)
        return pack_tiles(
            crops_TND,
            newline_D=self.newline,
            grid=(frame.rows, frame.columns),
            image_size=size,
            most_tiles=self.geometry.most_tiles,
        )

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Visual tokens [B, N, D], in the encoder's dtype on its device, from uint8 pixels [B, H, H, 3] anywhere."""
        return self.project(self.patches(self.see(pixels)))

    @torch.inference_mode()
    def see(self, pixels: Tensor) -> Tensor:
        """Hidden states [B, P, W] from uint8 pixels [B, H, H, 3]; a class token comes first."""
        pixels = self.normalize(pixels).to(self.dtype)
        if isinstance(self.layer, int):
            return self.tower(pixels).last_hidden_state
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        return torch.cat([hidden[layer] for layer in self.layer], dim=-1)

    def patches(self, hidden: Tensor) -> Tensor:
        """The hidden states [B, N, W] that the projector reads: without the first position, if the model drops it."""
        return hidden[:, 1:] if self.drops_first else hidden

    @torch.inference_mode()
    def project(self, patches: Tensor) -> Tensor:
        """Visual tokens [..., D] from hidden states [..., W]."""
        return self.projector(patches)

    @torch.inference_mode()
    def class_attention(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The class token's attention [B, N] and the keys [B, N, W] in the layer that reads `hidden` [B, P, W].

        a = softmax(q_class k^T / sqrt(W)) over all positions in float32, with queries and keys as one head of full
        width; the class token's own entry is then removed.
        """
        assert self.reader is not None, "the encoder was loaded without attention"
        normed = self.reader.layer_norm1(hidden)
        query = self.reader.self_attn.q_proj(normed[:, :1]).float()
        keys = self.reader.self_attn.k_proj(normed)
        attention = (query @ keys.float().mT / keys.shape[-1] ** 0.5).softmax(dim=-1)
        return attention[:, 0, 1:], keys[:, 1:]

    def _remember(self, layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keeps what enters the last layer that runs."""
        assert self.entering is not None
        self.entering[:] = [arguments[0] if arguments else keywords["hidden_states"]]

    @torch.inference_mode()
    def saliency(self) -> Tensor:
        """The class token's attention [B, N] in the layer that made the last hidden states, the mean over its heads.

        a = mean over heads of softmax(q_class k^T / sqrt(width of a head)) over all positions in float32; the class
        token's own entry is then removed.
        """
        assert self.entering, "the encoder was loaded without saliency, or has seen nothing"
        layer: Any = _transformer(self.tower).encoder.layers[-1]
        normed_BPW, attention = layer.layer_norm1(self.entering.pop()), layer.self_attn
        heads = attention.num_heads
        query_BHW = attention.q_proj(normed_BPW[:, 0]).unflatten(-1, (heads, -1)).float()
        keys_BPHW = attention.k_proj(normed_BPW).unflatten(-1, (heads, -1)).float()
        logits_BHP = torch.einsum("bhw,bphw->bhp", query_BHW, keys_BPHW) / query_BHW.shape[-1] ** 0.5
        return logits_BHP.softmax(dim=-1).mean(dim=1)[:, 1:]


def join_crops(crops: Sequence[Kept]) -> Kept:
    """The kept tokens of one picture from those of its crops, in order.

    Sources count through the tokens of all crops, and negative sources stay.
    """
    sources, before = [], 0
    for kept in crops:
        sources.append(torch.where(kept.source < 0, kept.source, kept.source + before))
        before += kept.num_visual
    return Kept(torch.cat([kept.tokens for kept in crops]), torch.cat(sources), before)


def _layer_behind(transformer: Any, config: Any) -> nn.Module:
    """The layer that reads the features, without the parts that `class_attention` does not run."""
    if not has_class_attention(config):
        raise ValueError(
            "methods that read the class token's attention need a vision tower with a class token and a layer behind "
            f"its features, got {config.vision_config.model_type} with feature layer {config.vision_feature_layer} of "
            f"{config.vision_config.num_hidden_layers} and strategy {config.vision_feature_select_strategy!r}"
        )
    (layer,) = feature_layers(config)
    behind = transformer.encoder.layers[layer]
    behind.mlp, behind.layer_norm2 = nn.Identity(), nn.Identity()
    return behind


def has_inner_vision_model(vision_config: Any) -> bool:
    """Whether the installed transformers nests the tower's weights under `.vision_model`; versions differ."""
    with torch.device("meta"):  # builds the names without allocating weights
        names = AutoModel.from_config(vision_config).state_dict()
    return any(name.startswith("vision_model.") for name in names)


def _transformer(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower)


def _cut_after(transformer: Any, layer: int) -> None:
    """Cuts the tower so that its output is hidden state `layer` (0 is the embedding). LLaVA reads state -2.

    The closing normalisation is removed too: SigLIP applies it to its output but hidden states lack it, and CLIP uses
    it only for pooling.
    """
    layers = transformer.encoder.layers
    del layers[layer % (len(layers) + 1) :]
    transformer.post_layernorm = nn.Identity()
