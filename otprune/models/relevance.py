"""How much each visual token has to do with a prompt: what CDPruner conditions its selection on.

    clip    r_i = mean over text chunks c of  - cos(P norm(y_i), t_c)

y_i is the hidden state that the projector reads, norm the CLIP vision tower's closing normalisation and P its
projection, t_c the text tower's embedding of the prompt: CDPruner's own relevance. The sign is its finding: dense CLIP
features are anti-aligned with text. LLaVA checkpoints hold no text tower, so the CLIP checkpoint that the vision tower
comes from must be named.

    words   r_i = mean over the prompt's tokens w of cos(v_i, e_w)

v_i is the projected token and e_w the language model's own embedding of a prompt token. No part of CDPruner: what a
checkpoint without its CLIP can offer.

Departures:
- The text is what the user asks, without the conversation format around it.
- Chunks hold what fits the text tower beside its begin and end tokens, each chunk with both.

Shapes: B images, N visual tokens, W tower width, D language width, T text tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

from otprune.models import resolve_checkpoint
from otprune.models.checkpoint import CheckpointError
from otprune.models.loading import load_part, read_tensors

EMBEDDING = r"^(model\.)?language_model\.(model\.)?embed_tokens\."


class ClipRelevance:
    """Relevance by the text tower of the CLIP checkpoint in `folder`, which the vision tower comes from."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str):
        config: Any = AutoConfig.from_pretrained(folder)
        if getattr(config, "model_type", None) != "clip":
            raise CheckpointError(
                f"a CLIP checkpoint must have model_type 'clip', got {config.model_type!r} in {folder}"
            )
        config.text_config.projection_dim = config.projection_dim
        text, vision = config.text_config, config.vision_config
        self.text = load_part(CLIPTextModelWithProjection, folder, text, {}, dtype).to(device)
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps).to(device, dtype)
        self.norm.load_state_dict(read_tensors(folder, r"^vision_model\.post_layernorm\."))
        (self.projection,) = (t.to(device, dtype) for t in read_tensors(folder, r"^visual_projection\.").values())
        self.tokenizer, self.room = (
            AutoTokenizer.from_pretrained(folder),
            config.text_config.max_position_embeddings - 2,
        )
        self.chunks: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, patches: Tensor, tokens: Tensor, prompts: list[str]) -> Tensor:
        """Hidden states [B, N, W] and visual tokens [B, N, D] of images with one prompt each -> [B, N], float32."""
        if patches.shape[-1] != self.projection.shape[1]:
            raise ValueError(
                f"CLIP's tower must be {patches.shape[-1]} wide as the model's, got {self.projection.shape[1]}"
            )
        seen = normalize((self.norm(patches.to(self.projection)) @ self.projection.T).float(), dim=-1)
        said = torch.stack([self._said(prompt) for prompt in prompts])
        return -(seen @ said[:, :, None])[:, :, 0]

    def _said(self, prompt: str) -> Tensor:
        """The mean of the chunks' unit embeddings, [projection width]: cosines average as their vectors do."""
        if prompt not in self.chunks:
            if len(self.chunks) > 1000:
                self.chunks.clear()
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            embeds = []
            for start in range(0, max(len(ids), 1), self.room):
                chunk = torch.tensor([[begin, *ids[start : start + self.room], end]], device=self.projection.device)
                embeds.append(normalize(self.text(input_ids=chunk).text_embeds[0].float(), dim=-1))
            self.chunks[prompt] = torch.stack(embeds).mean(dim=0)
        return self.chunks[prompt]


class WordRelevance:
    """Relevance by the language model's own word embeddings, the one tensor of it that is read."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str):
        found = read_tensors(folder, EMBEDDING)
        if "weight" not in found:
            raise CheckpointError(f"model.path must hold the language model's word embeddings, found none in {folder}")
        self.embedding = found["weight"].to(device, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, patches: Tensor, tokens: Tensor, prompts: list[str]) -> Tensor:
        """Hidden states [B, N, W] and visual tokens [B, N, D] of images with one prompt each -> [B, N], float32."""
        said = torch.stack([self._said(prompt) for prompt in prompts])
        return (normalize(tokens.float(), dim=-1) @ said[:, :, None])[:, :, 0]

    def _said(self, prompt: str) -> Tensor:
        """The mean of the prompt's unit embeddings, [D]."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return normalize(self.embedding[torch.tensor(ids, dtype=torch.int64)].float(), dim=-1).sum(dim=0) / max(
            len(ids), 1
        )


Relevance = Callable[[Tensor, Tensor, list[str]], Tensor]


def make_relevance(settings: dict[str, Any], model: Path, dtype: torch.dtype, device: str) -> Relevance:
    """What `settings.relevance` asks for.

    Raises:
        ValueError: if it is clip and no CLIP checkpoint is named.
    """
    match settings["relevance"]:
        case "words":
            return WordRelevance(model, dtype=dtype, device=device)
        case "none":
            return lambda patches, tokens, prompts: torch.ones(tokens.shape[:2], device=tokens.device)
        case _:
            return ClipRelevance(find_clip(settings), dtype=dtype, device=device)


def check_relevance(settings: dict[str, Any]) -> None:
    """Refuses settings that `make_relevance` could not follow, before anything is loaded.

    Raises:
        ValueError: as `find_clip`.
    """
    if settings["relevance"] == "clip":
        find_clip(settings)


def find_clip(settings: dict[str, Any]) -> Path:
    """Folder of the CLIP checkpoint that `settings.clip` names.

    Raises:
        ValueError: if it is not set or no such checkpoint.
    """
    if not settings["clip"]:
        raise ValueError(
            "settings.clip must name the CLIP checkpoint of the model's vision tower (LLaVA-1.5's is "
            "openai/clip-vit-large-patch14-336), for LLaVA holds no text tower; settings.relevance=words compares with "
            "the language model's word embeddings instead, and none keeps diverse tokens whatever is asked"
        )
    return resolve_checkpoint(settings["clip"], families=("clip",), key="prune.settings.clip")
