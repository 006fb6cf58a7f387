"""Packs the kept visual tokens of a unit's images into arrays for the way between stages, and unpacks them.

The arrays are `tokens` [rows, K, D] and `kept` int16 [rows, K], the index of each token in its picture. There is one
row for each picture of each image or, if the method looks at the prompt, for each picture of each prompt. Pictures may
keep different numbers of tokens. A row with fewer than K tokens ends in padding, with the index PADDING. The index -1
marks a token that belongs to no single place in the picture.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipelines.stages.unit_batch import UnitBatch

PADDING = -2


@dataclass(frozen=True, slots=True)
class Kept:
    """The visual tokens that a method keeps of one picture, for one prompt if the method looks at the prompt.

    `source` holds the index of each token before pruning. The source of a merged token is the token that it grew from:
    the centre of a pooled cell, or the token that others were merged into; -1 if there is none. Indices of LLaVA-1.6
    count through the packed sequence or, if tokens were chosen crop by crop, through all crops in order.
    """

    tokens: Tensor  # [K, D]
    source: Tensor  # int64 [K]
    num_visual: int | None = None  # tokens before pruning; None: the number of every square picture


def pack(rows: Sequence[Kept]) -> dict[str, np.ndarray]:
    """The arrays `tokens` and `kept` of one row or more."""
    tokens = pad_sequence([row.tokens for row in rows], batch_first=True)
    kept = pad_sequence([row.source for row in rows], batch_first=True, padding_value=PADDING)
    return {"tokens": to_numpy(tokens.cpu()), "kept": kept.to("cpu", torch.int16).numpy()}


def unpack(unit_batch: UnitBatch) -> list[list[list[Tensor]]]:
    """For each image, for each prompt, the tokens [K, D] of each picture, without padding: views of the arrays."""
    tokens = from_numpy(unit_batch.arrays["tokens"])
    lengths = (unit_batch.arrays["kept"] != PADDING).sum(axis=1).tolist()
    pictures = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    unpacked = []
    for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
        image_rows = pictures[rows.start : rows.stop]
        step = image.num_pictures if unit_batch.rows_per_prompt else 0  # 0: all prompts of an image share its rows
        starts = [j * step for j in range(len(image.prompts))]
        unpacked.append([image_rows[start : start + image.num_pictures] for start in starts])
    return unpacked


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy if the array is contiguous."""
    # Arrays of the object store are read-only, and torch warns about them. No stage writes to such a tensor.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tokens: Tensor) -> np.ndarray:
    """The tensor as an array. NumPy lacks bfloat16, so its bits become int16; `from_numpy` reverses that."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def from_numpy(tokens: np.ndarray) -> Tensor:
    """The array of `to_numpy` as a tensor."""
    tensor = as_tensor(tokens)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
