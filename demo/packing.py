"""Packs several questions behind one image into one forward pass: a dozen answers for the price of one.

    <s> USER :  [visual tokens]  question 1 ASSISTANT : answer 1  |  question 2 ASSISTANT : answer 2  | ...

A block mask hides the questions from each other, and every question starts at the same position. The logits of each
answer are therefore the same as if its question were asked alone.

Shape suffixes: B images, K visual tokens, T text tokens, S = 3 + K + T, D text width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

NO_TARGET = -100
_CAPTION_WEIGHT, _ANSWER_WEIGHT, _STOP_FACTOR = 1.0, 2.0, 0.3


class Asked(NamedTuple):
    task: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Packed:
    """Row b has the questions about image b. `segment` is 1, 2, ... by question, 0 in the prefix, -1 in padding."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]: the next token if it belongs to an answer, else NO_TARGET
    weights: Tensor  # [B, T]
    segment: Tensor  # [B, T]
    positions: Tensor  # [B, S]
    mask: Tensor  # [B, 1, S, S]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids in front of the visual tokens."""
    return tokenizer("USER :").input_ids


def pack(asked: Sequence[Sequence[Asked]], tokenizer: PreTrainedTokenizerBase, num_visual: int) -> Packed:
    """Pack the questions of each image behind `num_visual` visual tokens, padded on the right."""
    prefix = len(prefix_ids(tokenizer)) + num_visual
    rows = [_pack_row(questions, tokenizer, prefix) for questions in asked]
    length = max(len(row[0]) for row in rows)
    fills = (0, NO_TARGET, 0.0, -1, 0)
    tokens, targets, weights, segment, positions = (
        torch.tensor([row[part] + [fill] * (length - len(row[part])) for row in rows])
        for part, fill in enumerate(fills)
    )
    segment_BS = torch.cat([torch.zeros(len(rows), prefix, dtype=torch.long), segment], 1)
    positions_BS = torch.cat([torch.arange(prefix).expand(len(rows), -1), positions], 1)
    causal_SS = torch.ones(prefix + length, prefix + length, dtype=torch.bool).tril()
    visible_BSS = (segment_BS[:, None] == 0) | (segment_BS[:, None] == segment_BS[:, :, None])
    mask_BSS = causal_SS & visible_BSS | torch.eye(
        prefix + length, dtype=torch.bool
    )  # a row of all masked positions would give NaN
    return Packed(tokens, targets, weights, segment, positions_BS, mask_BSS[:, None])


def _pack_row(questions: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, start: int) -> tuple[list, ...]:
    """(tokens, targets, weights, segment, positions) of one image. The stop token is a target but never an input."""
    vocabulary, stop = tokenizer.get_vocab(), tokenizer.eos_token_id
    tokens, targets, weights, segment, positions = [], [], [], [], []
    for number, (task, question, answer) in enumerate(questions, start=1):
        question_ids = [vocabulary[word] for word in f"{question} ASSISTANT :".split()]
        answer_ids = [vocabulary[word] for word in answer.split()]
        weight = _CAPTION_WEIGHT if task == "caption" else _ANSWER_WEIGHT
        length = len(question_ids) + len(answer_ids)
        tokens += question_ids + answer_ids
        # A position predicts the token after it: the last token of the question has the answer's first as its target.
        targets += [NO_TARGET] * (len(question_ids) - 1) + [*answer_ids, stop]
        weights += [0.0] * (len(question_ids) - 1) + [weight] * len(answer_ids) + [_STOP_FACTOR * weight]
        segment += [number] * length
        positions += range(start, start + length)
    return tokens, targets, weights, segment, positions


def answer_logits(
    model: LlavaForConditionalGeneration, prefix: list[int], visual_BKD: Tensor, packed: Packed
) -> tuple[Tensor, Tensor]:
    """(logits float32 [M, V], is_target bool [B, T]) at the M positions that predict an answer token, row by row."""
    device, decoder = visual_BKD.device, model.model.language_model
    before_BPD = decoder.embed_tokens(torch.tensor(prefix, device=device)).expand(len(visual_BKD), -1, -1)
    text_BTD = decoder.embed_tokens(packed.tokens.to(device))
    hidden_BSD = decoder(
        inputs_embeds=torch.cat([before_BPD, visual_BKD.to(text_BTD.dtype), text_BTD], 1),
        attention_mask=packed.mask.to(device),
        position_ids=packed.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    is_target_BT = (packed.targets != NO_TARGET).to(device)
    hidden_MD = hidden_BSD[:, -packed.tokens.shape[1] :][is_target_BT].float()
    return hidden_MD @ decoder.embed_tokens.weight.float().T, is_target_BT
