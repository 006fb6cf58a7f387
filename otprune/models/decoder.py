"""The second half of a model: generates text from visual tokens and a prompt, with the language model alone.

The language model is one of transformers' causal language models, or a family's own that acts like one. The text side
(`prompts.py`) and the geometry of the checkpoint say where the tokens of a picture stand in a prompt (`Span`).

Shapes: D language width, R width of a visual row (D, or more with DeepStack), K visual tokens of one image, P images of
one prompt, A axes of positions.

Departures:
- In a prompt with several images every image is pruned; the released OTPrune and DivPrune code prunes only the first
  image and keeps all tokens of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from otprune.families.geometry import Span, line_span
from otprune.layerwise import Policy, generate_layerwise
from otprune.models.checkpoint import Checkpoint, read_checkpoint
from otprune.models.decoding import decode, draw, uniform_draws
from otprune.models.prompts import Completion, Prompt, Prompter

Visual = tuple[Tensor, Span]
"""What a prompt gets for one picture: the rows [K, R] of its visual tokens, and its span."""

Pictures = Tensor | Sequence[Tensor] | Sequence[Visual]
"""The pictures of one prompt. Rows without a span take one position each, one after the other; so does a lone tensor,
which is the one picture of its prompt."""


def load_decoder(checkpoint: Checkpoint | Path, *, dtype: torch.dtype, device: str) -> "Decoder":
    """Loads the language model and tokenizer of a checkpoint (as read already, or its folder), not the vision tower.

    Raises:
        CheckpointError: if weights are missing.
    """
    if isinstance(checkpoint, Path):
        checkpoint = read_checkpoint(str(checkpoint))
    model = checkpoint.record.load_language_model(checkpoint, dtype=dtype, device=device)
    if model.device.type == "cuda":
        # On sm_90 torch prefers cuDNN's attention, which builds a plan for every new key length, and so for every
        # decode step. The cost of the plans has not been measured.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return Decoder(checkpoint, model, AutoTokenizer.from_pretrained(checkpoint.path))


@dataclass(frozen=True, slots=True)
class Placed:
    """A prompt of L rows, ready for the language model."""

    rows: Tensor  # [L, D]
    positions: Tensor  # int64 [A, L]
    is_visual: Tensor  # bool [L]
    pictures: Tensor  # int64 [L], the number of each visual row's picture, counted from 1; 0 for text
    deep: tuple[Tensor, ...] = ()  # of each DeepStack level the rows [visual tokens, D]


class Decoder(Prompter):
    """Generates text from visual tokens and prompts, with the language model alone."""

    # `model` is `Any` because transformers has no type for a PreTrainedModel that generates.
    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: PreTrainedTokenizerBase):
        super().__init__(checkpoint, tokenizer, model.generation_config.eos_token_id)
        self.model, self.axes = model.eval(), checkpoint.geometry.axes
        self.both_ways = checkpoint.record.both_ways

    @torch.inference_mode()
    def generate(
        self,
        visual: Sequence[Pictures],
        prompts: list[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (),
        policy: Policy | None = None,
    ) -> list[Completion]:
        """One completion for each pair of visual tokens and prompt.

        The prompts are left-padded to one length and decoded together.

        Args:
            visual: the pictures of each prompt.
            prompts: token ids around the images, from `encode_prompt`.
            temperature: 0 decodes greedily; above 0, nucleus sampling of mass `top_p` with one of `seeds` a prompt.
            policy: deletes image tokens inside the model; every prompt must then hold one image.

        Raises:
            ValueError: if a prompt and its answer exceed the model's context, pictures and spans do not fit the prompt,
                seeds are needed and missing, or the policy does not accept a prompt.
            FloatingPointError: if the model's logits are not finite.
        """
        if temperature > 0 and len(seeds) != len(prompts):
            raise ValueError(f"sampling needs a seed for each of {len(prompts)} prompts, got {len(seeds)}")
        placed = [self.place(pictures, prompt) for pictures, prompt in zip(visual, prompts, strict=True)]
        rows = [prompt.rows for prompt in placed]
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
            positions=None if self.axes == 1 else _left_padded(placed, "positions"),
            prefill={"pictures": _left_padded(placed, "pictures")} if self.both_ways else deep_stack(placed),
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

    def place(self, pictures: Pictures, prompt: Prompt) -> Placed:
        """The rows of a prompt with their positions: its embedded text, and the span of each picture at its place.

        Text counts on from where it stands, on every axis. A picture's positions count from where its span begins, and
        its extent says where the text behind it goes on.
        """
        device, visual = self.model.device, self._with_spans(pictures)
        if len(visual) != len(prompt) - 1:
            raise ValueError(f"the prompt must get {len(prompt) - 1} images, got {len(visual)}")
        ids, positions, is_place, at = [], [], [], 0
        for i, text in enumerate(prompt):
            if i:
                tokens, span = visual[i - 1]
                is_place.append(span.tokens == self.image_token)
                if is_place[-1].sum() != len(tokens):
                    raise ValueError(f"a span must have {len(tokens)} image tokens, got {is_place[-1].sum()}")
                ids.append(span.tokens)
                positions.append(span.positions + at)
                at += span.extent
            ids.append(np.array(text, np.int64))
            is_place.append(np.zeros(len(text), bool))
            positions.append(np.tile(np.arange(at, at + len(text)), (self.axes, 1)))
            at += len(text)
        numbers = [(i + 1) // 2 * place for i, place in enumerate(is_place)]  # text and pictures take turns
        is_visual = torch.from_numpy(np.concatenate(is_place)).to(device)
        rows = self.model.get_input_embeddings()(torch.from_numpy(np.concatenate(ids)).to(device))
        kept = torch.cat([tokens.to(rows) for tokens, _ in visual]) if visual else rows[:0]
        width = rows.shape[1]
        rows[is_visual] = kept[:, :width]
        deep = kept[:, width:].split(width, dim=1) if kept.shape[1] > width else ()
        at_positions, pictures_of = np.concatenate(positions, axis=1), np.concatenate(numbers)
        return Placed(
            rows,
            torch.from_numpy(at_positions).to(device),
            is_visual,
            torch.from_numpy(pictures_of).to(device),
            deep,
        )

    def _with_spans(self, pictures: Pictures) -> list[Visual]:
        if isinstance(pictures, Tensor):
            pictures = [pictures]
        visual = []
        for picture in pictures:
            if isinstance(picture, Tensor):
                if self.axes != 1:
                    raise ValueError(
                        f"visual tokens must come with spans in a model with {self.axes} axes of positions"
                    )
                visual.append((picture, line_span(np.full(len(picture), self.image_token))))
            else:
                visual.append(picture)
        return visual


def deep_stack(placed: Sequence[Placed]) -> dict[str, Any]:
    """The arguments with which a language model adds DeepStack's rows to its first layers; {} without such rows."""
    if not placed[0].deep:
        return {}
    levels = [torch.cat(rows) for rows in zip(*(prompt.deep for prompt in placed), strict=True)]
    return {"visual_pos_masks": _left_padded(placed, "is_visual"), "deepstack_visual_embeds": levels}


def _left_padded(placed: Sequence[Placed], name: str) -> Tensor:
    """The field `name`, [..., L] of each prompt, as one tensor [..., B, longest L]; padding is 0."""
    rows = [getattr(prompt, name).movedim(-1, 0) for prompt in placed]
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    return padded.movedim(2, 0) if padded.dim() == 3 else padded


def image_span(prompt: Prompt, length: int) -> tuple[int, int]:
    """(first, behind last) row of the image in a prompt with one image and `length` rows."""
    before, after = prompt
    return len(before), length - len(after)
