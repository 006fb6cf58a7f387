"""Packs the kept visual tokens of a unit's images into arrays for the way between stages, and unpacks them.

The ragged arrays are `tokens` [K, R] and `kept` int32 [K], the index of each token in its picture. There is one row for
each picture of each image or, if the method looks at the prompt, for each picture of each prompt. The index -1 marks a
token that belongs to no single place in the picture.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from otprune.families import Size
from otprune.models import Kept
from pipelines.stages.ragged import Ragged
from pipelines.stages.unit_batch import UnitBatch


@dataclass(frozen=True, slots=True)
class KeptRows:
    """The kept visual tokens of one picture, as the generate stage finds them."""

    tokens: Tensor  # [K, R]
    kept: np.ndarray  # int32 [K]
    size: Size


def pack(rows: Sequence[Kept], width: int, dtype: torch.dtype) -> dict[str, Ragged]:
    """The arrays `tokens` and `kept`; without rows they are empty, but of the same types."""
    tokens = to_numpy(torch.cat([row.tokens for row in rows]).cpu() if rows else torch.empty(0, width, dtype=dtype))
    lengths = np.array([len(row.source) for row in rows], np.int64)
    kept = torch.cat([row.source for row in rows]).to("cpu", torch.int32).numpy() if rows else np.empty(0, np.int32)
    return {"tokens": Ragged(tokens, lengths), "kept": Ragged(kept, lengths)}


def unpack(unit_batch: UnitBatch) -> list[list[list[KeptRows]]]:
    """For each image, for each prompt, the tokens of each picture: views of the arrays."""
    tokens = from_numpy(unit_batch.arrays["tokens"].values).split(unit_batch.arrays["tokens"].lengths.tolist())
    kept = unit_batch.arrays["kept"].rows()
    unpacked = []
    for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
        step = image.num_pictures if unit_batch.rows_per_prompt else 0  # 0: all prompts of an image share its rows
        unpacked.append(
            [
                [
                    KeptRows(tokens[row], kept[row], size)
                    for row, size in enumerate(image.sizes, start=rows.start + j * step)
                ]
                for j in range(len(image.prompts))
            ]
        )
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
