"""Visual tokens between the stages: as arrays, of images that may have kept different numbers of them.

`tokens` [rows, K, D] and `kept` int16 [rows, K], the index of each token in its image. There is a row for each picture
of each image, or, where the method looks at the prompt, for each picture of each prompt. Rows shorter than the longest
end in padding, whose index is PADDING; -1 is a token of no one place in the image.
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
    """What is left of one picture: `tokens` [K, D], and `source` int64 [K].

    The source of a token is the index of the one it was, or, for a merged one, of the one it grew from: the centre of a
    pooled cell, the token that others were merged into; -1 where there is none. LLaVA-1.6's tokens count as they stand
    in the packed sequence, or, chosen tile by tile, crop after crop.
    """

    tokens: Tensor
    source: Tensor
    num_visual: int | None = None  # tokens before pruning; None: as many as every square picture has


def pack(rows: Sequence[Kept]) -> dict[str, np.ndarray]:
    """The arrays `tokens` and `kept` of at least one row."""
    tokens = pad_sequence([row.tokens for row in rows], batch_first=True)
    kept = pad_sequence([row.source for row in rows], batch_first=True, padding_value=PADDING)
    return {"tokens": to_numpy(tokens.cpu()), "kept": kept.to("cpu", torch.int16).numpy()}


def unpack(unit_batch: UnitBatch) -> list[list[list[Tensor]]]:
    """Tokens [K, D] of each picture of each prompt of each image, without padding: views of `unit_batch.arrays`."""
    tokens = from_numpy(unit_batch.arrays["tokens"])
    lengths = (unit_batch.arrays["kept"] != PADDING).sum(axis=1).tolist()
    pictures = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    unpacked = []
    for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
        shown, step = pictures[rows.start : rows.stop], image.num_pictures if unit_batch.rows_per_prompt else 0
        starts = [j * step for j in range(len(image.prompts))]
        unpacked.append([shown[start : start + image.num_pictures] for start in starts])
    return unpacked


def as_tensor(array: np.ndarray) -> Tensor:
    """The array without a copy. Those of the object store are read-only, which is fine: no stage writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tokens: Tensor) -> np.ndarray:
    """bfloat16, which NumPy lacks, goes as its bits in int16; `from_numpy` turns it back."""
    return (tokens.view(torch.int16) if tokens.dtype == torch.bfloat16 else tokens).numpy()


def from_numpy(tokens: np.ndarray) -> Tensor:
    tensor = as_tensor(tokens)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
