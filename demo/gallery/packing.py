"""Packs several questions behind one picture into one forward pass: a dozen answers for the price of one.

    <|im_start|> user <|vision_start|> [visual tokens]  |  <|vision_end|> question 1 <|im_end|> ... answer 1  |  ...

A block mask hides the questions from each other, and every question starts at the same position. The logits of each
answer are therefore the same as if its question were asked alone. Positions are M-RoPE's: (time, height, width), where
a visual token has its row and column, and a text goes on after the larger of the two.

Shape suffixes: B pictures of one size, K kept visual tokens, T text tokens, S = 3 + K + T.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from demo.gallery.model import END, PICTURE_END, PICTURE_START, START

NO_TARGET = -100
_CAPTION_WEIGHT, _ANSWER_WEIGHT, _STOP_FACTOR = 1.0, 2.0, 0.3


class Asked(NamedTuple):
    task: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Packed:
    """Row b has the questions about picture b. `segment` is 1, 2, ... by question and -1 in padding."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T]: the next token if it belongs to an answer, else NO_TARGET
    weights: Tensor  # [B, T]
    segment: Tensor  # [B, T]
    positions: Tensor  # [3, B, S]
    mask: Tensor  # [B, 1, S, S]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids in front of the visual tokens."""
    return tokenizer.convert_tokens_to_ids([START, "user", PICTURE_START])


def pack(
    asked: Sequence[Sequence[Asked]], tokenizer: PreTrainedTokenizerBase, kept_BK: Tensor, columns: int, rows: int
) -> Packed:
    """Packs the questions of each picture behind its kept visual tokens, padded on the right.

    kept_BK: the numbers of the kept cells in raster order.
    """
    before = len(prefix_ids(tokenizer))
    packed_rows = [_pack_row(questions, tokenizer, before + max(columns, rows)) for questions in asked]
    length = max(len(row[0]) for row in packed_rows)
    fills = (0, NO_TARGET, 0.0, -1, 0)
    tokens, targets, weights, segment, text = (
        torch.tensor([row[part] + [fill] * (length - len(row[part])) for row in packed_rows])
        for part, fill in enumerate(fills)
    )
    first = torch.arange(before).expand(len(asked), -1)
    places = torch.stack([torch.zeros_like(kept_BK), kept_BK // columns, kept_BK % columns]) + before
    positions = torch.cat([first.expand(3, -1, -1), places, text.expand(3, -1, -1)], 2)
    segment_BS = F.pad(segment, (positions.shape[2] - length, 0))
    causal_SS = torch.ones(positions.shape[2], positions.shape[2], dtype=torch.bool).tril()
    visible_BSS = (segment_BS[:, None] == 0) | (segment_BS[:, None] == segment_BS[:, :, None])
    alone = torch.eye(positions.shape[2], dtype=torch.bool)  # a row of all masked positions would give NaN
    return Packed(tokens, targets, weights, segment, positions, (causal_SS & visible_BSS | alone)[:, None])


def _pack_row(questions: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, start: int) -> tuple[list, ...]:
    """(tokens, targets, weights, segment, positions) of one picture. The stop token is a target but never an input."""
    ids, stop = tokenizer.convert_tokens_to_ids, tokenizer.eos_token_id
    tokens, targets, weights, segment, positions = [], [], [], [], []
    for number, (task, question, answer) in enumerate(questions, start=1):
        asked = ids([PICTURE_END, *question.split(), END, START, "assistant"])
        answered = ids(answer.split())
        weight = _CAPTION_WEIGHT if task in ("long", "short") else _ANSWER_WEIGHT
        length = len(asked) + len(answered)
        tokens += asked + answered
        # A position predicts the token after it: the last token of the question has the answer's first as its target.
        targets += [NO_TARGET] * (len(asked) - 1) + [*answered, stop]
        weights += [0.0] * (len(asked) - 1) + [weight] * len(answered) + [_STOP_FACTOR * weight]
        segment += [number] * length
        positions += range(start, start + length)
    return tokens, targets, weights, segment, positions


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, prefix: list[int], visual_BKD: Tensor, packed: Packed
) -> tuple[Tensor, Tensor]:
    """(logits float32 [M, V], is_target bool [B, T]) at the M positions that predict an answer token, row by row."""
    device, decoder = visual_BKD.device, model.model.language_model
    before = decoder.embed_tokens(torch.tensor(prefix, device=device)).expand(len(visual_BKD), -1, -1)
    text = decoder.embed_tokens(packed.tokens.to(device))
    hidden = decoder(
        inputs_embeds=torch.cat([before, visual_BKD.to(text.dtype), text], 1),
        attention_mask=packed.mask.to(device),
        position_ids=packed.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    is_target = (packed.targets != NO_TARGET).to(device)
    chosen = hidden[:, -packed.tokens.shape[1] :][is_target].float()
    return chosen @ decoder.embed_tokens.weight.float().T, is_target
