"""LLaVA's second half: visual tokens with a prompt to text. `encoder.py` has the first.

Both are written against transformers' `CLIPVisionModel` and `LlamaForCausalLM`; any vision tower and language
model that `AutoModel` and `AutoModelForCausalLM` build from the checkpoint's two sub-configurations
work the same. Weight names as in the released llava-hf checkpoints and as transformers 5 saves them.

Shapes: D language width, K visual tokens of one image, P images of one prompt.

Departures:
- In a prompt with several images every image is pruned; the released OTPrune and DivPrune code prunes the first alone
  and keeps all tokens of the others.
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
    """Language model and tokenizer of the checkpoint in `folder`; the vision tower is never read.

    Raises:
        CheckpointError: if weights are missing.
    """
    config = AutoConfig.from_pretrained(folder)
    names = {HEAD_PREFIX: "", LANGUAGE_PREFIX: "model."}
    model = load_part(AutoModelForCausalLM, folder, config.text_config, names, dtype).to(device)
    if model.device.type == "cuda":
        # On sm_90 torch tries cuDNN's attention first, which builds a plan for each new key length, so for each step of
        # the plain loops; what that costs is not measured.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return LlavaDecoder(config, model, AutoTokenizer.from_pretrained(folder), folder)


class LlavaDecoder(Prompter):
    """Visual tokens and a prompt to text, with the language model alone."""

    # `model` is a PreTrainedModel that generates, for which transformers has no type
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
        """One completion for each pair of visual tokens and prompt: [K, D] for one image, P of these for P images.

        Prompts are left-padded to one length and decoded together: greedily at temperature 0, else by nucleus sampling,
        each with the random numbers of its own seed. Positions are contiguous over kept tokens. A `policy` thins the
        image out inside the model, which takes prompts with one image.

        Raises:
            ValueError: if a prompt and its answer would not fit the model's context, seeds are needed and missing, or
                the policy refuses a prompt.
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
        """New token ids of each prompt, whose image `policy` thins out while it is read."""
        if wrong := [len(prompt) - 1 for prompt in prompts if len(prompt) != 2]:
            raise ValueError(f"pruning inside the model takes prompts with one image, got {wrong[0]}")
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
        """The prompt's text with each image's tokens in their place, [length, D]."""
        embed = self.model.get_input_embeddings()
        text = embed(torch.tensor([token for ids in prompt for token in ids], device=self.model.device))
        images = (visual,) if isinstance(visual, Tensor) and visual.dim() == 2 else visual
        pieces = text.split([len(ids) for ids in prompt])
        pairs = ((image.to(text), after) for image, after in zip(images, pieces[1:], strict=True))
        return torch.cat([pieces[0], *(part for pair in pairs for part in pair)])


def image_span(prompt: Prompt, length: int) -> tuple[int, int]:
    """First and behind last row of the image in a prompt of one image that is `length` rows long."""
    before, after = prompt
    return len(before), length - len(after)
