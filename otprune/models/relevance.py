"""The relevance of each visual token to a prompt, on which CDPruner conditions its selection.

    clip    r_i = mean over text chunks c of  - cos(P norm(y_i), t_c)

This is CDPruner's own relevance. y_i is the hidden state that the projector reads, norm the CLIP vision tower's closing
normalisation, P the tower's projection, and t_c the text tower's embedding of a chunk of the prompt. The sign is
CDPruner's finding: dense CLIP features are anti-aligned with text. LLaVA checkpoints hold no text tower, so the user
must name the CLIP checkpoint from which the vision tower comes.

    words   r_i = mean over the prompt's tokens w of cos(v_i, e_w)

v_i is the projected token and e_w the language model's own embedding of a prompt token. This relevance is no part of
CDPruner; it needs no CLIP checkpoint.

The text is the user's prompt without the conversation format around it, and without the instruction how to answer that
CDPruner's scripts remove (`asked`).

Departures:
- A chunk holds as many tokens as fit in the text tower beside a begin and an end token; every chunk has both.

Shapes: B images, N visual tokens, W tower width, D language width, E width of CLIP's projection.
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

INSTRUCTIONS = (
    "\nAnswer the question using a single word or phrase.",  # of the VQA benchmarks
    "\nAnswer with the option's letter from the given choices directly.",  # of ScienceQA and MMBench
)
EMBEDDING = r"^(model\.)?((language_model|text_model)\.)?(model\.)?embed_tokens\."


def asked(prompt: str) -> str:
    """The prompt without the instruction of a benchmark how to answer, which says nothing about the picture."""
    for instruction in INSTRUCTIONS:
        prompt = prompt.replace(instruction, "")
    return prompt


class ClipRelevance:
    """Relevance by the text tower of the CLIP checkpoint in `folder`, from which the vision tower comes."""

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
        self.cache: dict[str, Tensor] = {}  # prompt -> embedding, because images often share prompts

    @torch.inference_mode()
    def __call__(self, patches: Tensor | None, tokens: Tensor, prompts: list[str]) -> Tensor:
        """The relevance of images with one prompt each; shapes as in `Relevance`.

        Raises:
            ValueError: if there are no hidden states, or they are not as wide as the CLIP vision tower.
        """
        if patches is None:
            raise ValueError("settings.relevance=clip needs the hidden states of a CLIP tower, got none")
        if patches.shape[-1] != self.projection.shape[1]:
            raise ValueError(
                f"CLIP's tower must be {patches.shape[-1]} wide as the model's, got {self.projection.shape[1]}"
            )
        image_BNE = normalize((self.norm(patches.to(self.projection)) @ self.projection.T).float(), dim=-1)
        text_BE = torch.stack([self._embed(asked(prompt)) for prompt in prompts])
        return -(image_BNE @ text_BE[:, :, None])[:, :, 0]

    def _embed(self, prompt: str) -> Tensor:
        """The mean [E] of the unit embeddings of a prompt's chunks.

        A cosine is linear in a unit vector, so the product with the mean is the mean of the cosines.
        """
        if prompt not in self.cache:
            if len(self.cache) > 1000:
                self.cache.clear()  # bounds the memory of a job in which every image has a prompt of its own
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            embeds = []
            for start in range(0, max(len(ids), 1), self.room):
                chunk = torch.tensor([[begin, *ids[start : start + self.room], end]], device=self.projection.device)
                embeds.append(normalize(self.text(input_ids=chunk).text_embeds[0].float(), dim=-1))
            self.cache[prompt] = torch.stack(embeds).mean(dim=0)
        return self.cache[prompt]


class WordRelevance:
    """Relevance by the language model's own word embeddings; no other tensor of that model is read."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str):
        tensors = read_tensors(folder, EMBEDDING)
        if "weight" not in tensors:
            raise CheckpointError(f"model.path must hold the language model's word embeddings, found none in {folder}")
        self.embedding = tensors["weight"].to(device, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, patches: Tensor | None, tokens: Tensor, prompts: list[str]) -> Tensor:
        """The relevance of images with one prompt each; shapes as in `Relevance`."""
        text_BD = torch.stack([self._embed(asked(prompt)) for prompt in prompts])
        return (normalize(tokens.float(), dim=-1) @ text_BD[:, :, None])[:, :, 0]

    def _embed(self, prompt: str) -> Tensor:
        """The mean [D] of the unit embeddings of a prompt's tokens; zero for an empty prompt."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return normalize(self.embedding[torch.tensor(ids, dtype=torch.int64)].float(), dim=-1).sum(dim=0) / max(
            len(ids), 1
        )


Relevance = Callable[[Tensor | None, Tensor, list[str]], Tensor]
"""(hidden states [B, N, W] or None, visual tokens [B, N, D], B prompts) -> relevance float32 [B, N]."""


def make_relevance(settings: dict[str, Any], model: Path, dtype: torch.dtype, device: str) -> Relevance:
    """The relevance that `settings.relevance` names: clip, words or none, which is 1 for every token.

    Raises:
        ValueError: for clip, as `find_clip`.
    """
    match settings["relevance"]:
        case "words":
            return WordRelevance(model, dtype=dtype, device=device)
        case "none":
            return lambda patches, tokens, prompts: torch.ones(tokens.shape[:2], device=tokens.device)
        case _:
            return ClipRelevance(find_clip(settings), dtype=dtype, device=device)


def check_relevance(settings: dict[str, Any]) -> None:
    """Checks settings for `make_relevance` before a model is loaded.

    Raises:
        ValueError: as `find_clip`.
    """
    if settings["relevance"] == "clip":
        find_clip(settings)


def find_clip(settings: dict[str, Any]) -> Path:
    """The folder of the CLIP checkpoint that `settings.clip` names.

    Raises:
        ValueError: if `settings.clip` is not set, or names no CLIP checkpoint.
    """
    if not settings["clip"]:
        raise ValueError(
            "settings.clip must name the CLIP checkpoint of the model's vision tower (LLaVA-1.5's is "
            "openai/clip-vit-large-patch14-336), because LLaVA holds no text tower; settings.relevance=words compares "
            "with the language model's word embeddings instead, and settings.relevance=none ignores the prompt"
        )
    return resolve_checkpoint(settings["clip"], families=("clip",), key="prune.settings.clip")
