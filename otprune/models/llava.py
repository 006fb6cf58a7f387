"""LLaVA-1.5 in two halves: images to visual tokens, and visual tokens with a prompt to text.

Written against transformers' `CLIPVisionModel` and `LlamaForCausalLM`; any vision tower and language
model that `AutoModel` and `AutoModelForCausalLM` build from the checkpoint's two sub-configurations
work the same. Weight names as in the released llava-hf checkpoints and as transformers 5 saves them.

Shapes: B images, H pixels a side, N visual tokens, D language width, K kept tokens, P images of one prompt.

Departures:
- In a prompt with several images every image is pruned; the released OTPrune and DivPrune code prunes the first alone
  and keeps all tokens of the others.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging as transformers_logging

from otprune.models.checkpoint import CheckpointError, image_statistics
from otprune.models.decoding import decode
from otprune.models.prompts import render_prompt

VISION_PREFIX = r"^(model\.)?vision_tower\.(vision_model\.)?"
PROJECTOR_PREFIX = r"^(model\.)?multi_modal_projector\."
HEAD_PREFIX = r"^(model\.)?language_model\.(?=lm_head\.)"
LANGUAGE_PREFIX = r"^(model\.)?language_model\.(model\.)?"

Prompt = tuple[list[int], ...]
"""Token ids of the text before, between and after the images: one list more than there are images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One generated text. `num_generated_tokens` counts the end token; `finish_reason` is stop or length."""

    text: str
    num_prompt_tokens: int
    num_generated_tokens: int
    finish_reason: str


def load_encoder(folder: Path, *, dtype: torch.dtype, device: str) -> "LlavaEncoder":
    """Vision tower and projector of the checkpoint in `folder`; the language model is never read.

    Raises:
        CheckpointError: if weights are missing.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    inner = "vision_model." if _has_inner_vision_model(config.vision_config) else ""
    tower = _load(AutoModel, folder, config.vision_config, {VISION_PREFIX: inner}, dtype)
    projector = LlavaMultiModalProjector(config).to(dtype)
    _fill(projector, _read_tensors(folder, PROJECTOR_PREFIX), folder)
    return LlavaEncoder(config, tower.to(device), projector.to(device).eval(), *image_statistics(folder))


def load_decoder(folder: Path, *, dtype: torch.dtype, device: str) -> "LlavaDecoder":
    """Language model and tokenizer of the checkpoint in `folder`; the vision tower is never read.

    Raises:
        CheckpointError: if weights are missing.
    """
    config = AutoConfig.from_pretrained(folder)
    names = {HEAD_PREFIX: "", LANGUAGE_PREFIX: "model."}
    model = _load(AutoModelForCausalLM, folder, config.text_config, names, dtype)
    return LlavaDecoder(config, model.to(device), AutoTokenizer.from_pretrained(folder), folder)


class LlavaEncoder(nn.Module):
    """uint8 pixels [B, H, H, 3] to projected visual tokens [B, N, D]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Any, tower: PreTrainedModel, projector: nn.Module, mean: list, std: list):
        super().__init__()
        self.tower, self.projector = tower, projector
        if isinstance(config.vision_feature_layer, int):
            _cut_after(_transformer(tower), config.vision_feature_layer)
        self.layer = config.vision_feature_layer
        self.drop_class_token = config.vision_feature_select_strategy == "default"
        self.image_size: int = config.vision_config.image_size
        num_positions = _transformer(tower).embeddings.position_embedding.weight.shape[0]  # CLIP's hold a class token
        self.num_tokens: int = num_positions - 1 if self.drop_class_token else num_positions
        self.width: int = config.text_config.hidden_size
        device, dtype = tower.device, tower.dtype
        self.register_buffer("mean", torch.tensor(mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device).view(1, 3, 1, 1), persistent=False)
        self.dtype = dtype

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, H, 3] on any device -> [B, N, D] in the encoder's dtype on its device."""
        pixels = pixels.to(self.mean.device, non_blocking=True).permute(0, 3, 1, 2)
        pixels = (pixels.float() / 255 - self.mean) / self.std  # as CLIP's image processor: rescale, then normalise
        first = 1 if self.drop_class_token else 0
        if isinstance(self.layer, int):
            return self.projector(self.tower(pixels.to(self.dtype)).last_hidden_state[:, first:])
        hidden = self.tower(pixels.to(self.dtype), output_hidden_states=True).hidden_states
        return self.projector(torch.cat([hidden[layer][:, first:] for layer in self.layer], dim=-1))


class LlavaDecoder:
    """Visual tokens and a prompt to text, with the language model alone."""

    # `model` is a PreTrainedModel that generates, for which transformers has no type
    def __init__(self, config: Any, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path):
        self.model, self.tokenizer, self.folder = model.eval(), tokenizer, folder
        self.image_token = config.image_token_index
        self.max_length: int = config.text_config.max_position_embeddings
        self.end_tokens = _end_tokens(model, tokenizer, folder)

    def encode_prompt(self, text: str, conversation: str = "auto", num_images: int = 1) -> Prompt:
        """Token ids before, between and after the images, for the user text `text` in the model's conversation format.

        Raises:
            ValueError: if the result does not hold exactly `num_images` image placeholders.
        """
        ids = self.tokenizer(render_prompt(text, conversation, self.folder, self.tokenizer, num_images)).input_ids
        found = [i for i, token in enumerate(ids) if token == self.image_token]
        if len(found) != num_images:
            wanted = "one image" if num_images == 1 else f"{num_images} images"
            raise ValueError(f"a prompt must hold exactly {wanted}, got {len(found)} in {text!r}")
        starts, ends = [0, *(i + 1 for i in found)], [*found, len(ids)]
        return tuple(ids[start:end] for start, end in zip(starts, ends, strict=True))

    @torch.inference_mode()
    def generate(
        self,
        visual: list[Tensor],
        prompts: list[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (),
    ) -> list[Completion]:
        """One completion for each pair of visual tokens and prompt: [K_i, D] for one image, [P, K_i, D] for P of them.

        Prompts are left-padded to one length and decoded together: greedily at temperature 0, else by nucleus sampling,
        each with the random numbers of its own seed. Positions are contiguous over kept tokens.

        Raises:
            ValueError: if a prompt and its answer would not fit the model's context, or seeds are needed and missing.
        """
        if temperature > 0 and len(seeds) != len(prompts):
            raise ValueError(f"sampling needs a seed for each of {len(prompts)} prompts, got {len(seeds)}")
        rows = [self._embed(tokens, prompt) for tokens, prompt in zip(visual, prompts, strict=True)]
        longest = max(len(row) for row in rows)
        if longest + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt and answer must fit {self.max_length} tokens, got {longest} + {max_new_tokens} new ones"
            )
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.long) for row in rows], True, padding_side="left")
        answers = decode(
            self.model,
            embeds,
            mask,
            max_new_tokens=max_new_tokens,
            end_tokens=self.end_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=seeds,
        )
        return [self._completion(len(row), ids) for row, ids in zip(rows, answers, strict=True)]

    def _embed(self, tokens: Tensor, prompt: Prompt) -> Tensor:
        """The prompt's text with each image's tokens in their place, [length, D]."""
        embed = self.model.get_input_embeddings()
        text = embed(torch.tensor([token for ids in prompt for token in ids], device=self.model.device))
        tokens = tokens.to(text.device, text.dtype)
        visual = tokens.unbind() if tokens.dim() == 3 else (tokens,)
        pieces = text.split([len(ids) for ids in prompt])
        return torch.cat([pieces[0], *(part for pair in zip(visual, pieces[1:], strict=True) for part in pair)])

    def _completion(self, num_prompt_tokens: int, ids: list[int]) -> Completion:
        end = next((i for i, token in enumerate(ids) if token in self.end_tokens), None)
        kept = ids if end is None else ids[:end]
        return Completion(
            text=cast(str, self.tokenizer.decode(kept, skip_special_tokens=True)).strip(),
            num_prompt_tokens=num_prompt_tokens,
            num_generated_tokens=len(ids) if end is None else end + 1,
            finish_reason="length" if end is None else "stop",
        )


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """Ids that end an answer: the generation configuration's, else the tokenizer's."""
    ids: Any = model.generation_config.eos_token_id
    ids = cast(Any, tokenizer.eos_token_id) if ids is None else ids
    if ids is None:
        raise CheckpointError(f"model.path must name an end token (eos_token_id), found none in {folder}")
    return [ids] if isinstance(ids, int) else list(ids)


def _load(cls: Any, folder: Path, config: Any, names: dict[str, str], dtype: torch.dtype) -> Any:
    """`cls` with the part of the checkpoint that `names` (regular expression -> new prefix) maps onto it."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the other half of the checkpoint is reported as unexpected
    transformers_logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            folder, config=config, dtype=dtype, key_mapping=names, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_missing(info["missing_keys"], model, folder)
    return model.eval()


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    _check_missing(set(module.state_dict()) - set(tensors), module, folder)
    module.load_state_dict(tensors)


def _check_missing(names: Iterable[str], module: nn.Module, folder: Path) -> None:
    if missing := sorted(names):
        raise CheckpointError(f"{folder} lacks {len(missing)} weights of {type(module).__name__}, e.g. {missing[0]}")


def _has_inner_vision_model(vision_config: Any) -> bool:
    """Whether this transformers version nests the tower's weights under `.vision_model`; they differ in this."""
    with torch.device("meta"):
        names = AutoModel.from_config(vision_config).state_dict()
    return any(name.startswith("vision_model.") for name in names)


def _read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                if match := re.match(prefix, name):
                    tensors[name[match.end() :]] = stored.get_tensor(name)
    return tensors


def _transformer(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower)


def _cut_after(transformer: Any, layer: int) -> None:
    """Makes hidden state `layer` (0 is the embedding) the output; LLaVA reads state -2, never the last layer.

    The closing normalisation goes as well: SigLIP's output has it, hidden states do not; CLIP only pools with it.
    """
    layers = transformer.encoder.layers
    del layers[layer % (len(layers) + 1) :]
    transformer.post_layernorm = nn.Identity()
