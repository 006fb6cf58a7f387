"""LLaVA's second half: generates text from visual tokens and a prompt. `encoder.py` has the first half.

Both halves are written against transformers' `CLIPVisionModel` and `LlamaForCausalLM`. Any vision tower and language
model that `AutoModel` and `AutoModelForCausalLM` build from the checkpoint's two sub-configurations work the same. The
halves read the weight names of the released llava-hf checkpoints and those under which transformers 5 saves them.

Shapes: D language width, K visual tokens of one image, P images of one prompt.

Departures:
- In a prompt with several images every image is pruned; the released OTPrune and DivPrune code prunes only the first
  image and keeps all tokens of the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from otprune.layerwise import Policy, generate_layerwise
from otprune.models.decoding import decode, draw, uniform_draws
from otprune.models.loading import load_part
from otprune.models.prompts import Completion, Prompt, Prompter

HEAD_PREFIX = r"^(model\.)?language_model\.(?=lm_head\.)"
LANGUAGE_PREFIX = r"^(model\.)?language_model\.(model\.)?"


def load_decoder(folder: Path, *, dtype: torch.dtype, device: str) -> "LlavaDecoder":
    """Loads the language model and tokenizer of the checkpoint in `folder`, without reading the vision tower.

    Raises:
        CheckpointError: if weights are missing.
    """
    config = AutoConfig.from_pretrained(folder)
    names = {HEAD_PREFIX: "", LANGUAGE_PREFIX: "model."}
    model = load_part(AutoModelForCausalLM, folder, config.text_config, names, dtype).to(device)
    if model.device.type == "cuda":
        # On sm_90 torch prefers cuDNN's attention, which builds a plan for every new key length, and so for every
        # decode step. The cost of the plans has not been measured.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return LlavaDecoder(config, model, AutoTokenizer.from_pretrained(folder), folder)


class LlavaDecoder(Prompter):
    """Generates text from visual tokens and prompts, with the language model alone."""

    # `model` is `Any` because transformers has no type for a PreTrainedModel that generates.
    def __init__(self, config: Any, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path):
        super().__init__(config, tokenizer, folder, model.generation_config.eos_token_id)
        self.model = model.eval()

    @torch.inference_mode()
    def generate(
        self,
        visual: Sequence[Tensor | Sequence[Tensor]],
        prompts: list[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (),
        policy: Policy | None = None,
    ) -> list[Completion]:
        """One completion for each pair of visual tokens and prompt.

        The prompts are left-padded to one length and decoded together. Positions are contiguous over kept tokens.

        Args:
            visual: for each prompt, tokens [K, D] of its one image, or a sequence of P such tensors for P images.
            prompts: token ids around the images, from `encode_prompt`.
            temperature: 0 decodes greedily; above 0, nucleus sampling of mass `top_p` with one of `seeds` a prompt.
            policy: deletes image tokens inside the model; every prompt must then hold one image.

        Raises:
            ValueError: if a prompt and its answer exceed the model's context, seeds are needed and missing, or the
                policy does not accept a prompt.
            FloatingPointError: if the model's logits are not finite.
        """
        if temperature > 0 and len(seeds) != len(prompts):
            raise ValueError(f"sampling needs a seed for each of {len(prompts)} prompts, got {len(seeds)}")
        rows = [self.embed(tokens, prompt) for tokens, prompt in zip(visual, prompts, strict=True)]
        longest = max(len(row) for row in rows)
        if longest + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt and answer must fit {self.max_length} tokens, got {longest} + {max_new_tokens} new ones"
            )
        if policy is not None:
            answers = self._generate_inside(rows, prompts, policy, max_new_tokens, temperature, top_p, seeds)
            return [self.completion(len(row), ids) for row, ids in zip(rows, answers, strict=True)]
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
        return [self.completion(len(row), ids) for row, ids in zip(rows, answers, strict=True)]

    def _generate_inside(
        self,
        rows: list[Tensor],
        prompts: list[Prompt],
        policy: Policy,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        """The new token ids of each prompt; `policy` deletes image tokens inside the model."""
        if other_counts := [len(prompt) - 1 for prompt in prompts if len(prompt) != 2]:
            raise ValueError(f"pruning inside the model takes prompts with one image, got {other_counts[0]}")
        draws = uniform_draws(seeds, max_new_tokens, self.model.device) if temperature > 0 else None

        def choose(logits: Tensor, step: int) -> Tensor:
            return logits.argmax(dim=-1) if draws is None else draw(logits, temperature, top_p, draws[:, step])

        return generate_layerwise(
            self.model,
            rows,
            [image_span(prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)],
            policy,
            max_new_tokens=max_new_tokens,
            end_tokens=self.end_tokens,
            choose=choose,
        )

    def embed(self, visual: Tensor | Sequence[Tensor], prompt: Prompt) -> Tensor:
        """The input rows [length, D] of a prompt: its embedded text, with each image's tokens at their place."""
        embed = self.model.get_input_embeddings()
        text = embed(torch.tensor([token for ids in prompt for token in ids], device=self.model.device))
        images = (visual,) if isinstance(visual, Tensor) and visual.dim() == 2 else visual
        pieces = text.split([len(ids) for ids in prompt])
        pairs = ((image.to(text), after) for image, after in zip(images, pieces[1:], strict=True))
        return torch.cat([pieces[0], *(part for pair in pairs for part in pair)])


def image_span(prompt: Prompt, length: int) -> tuple[int, int]:
    """(first, behind last) row of the image in a prompt with one image and `length` rows."""
    before, after = prompt
    return len(before), length - len(after)
