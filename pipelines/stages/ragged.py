"""Rows of different lengths in one array: what travels between stages, as pictures differ in size and kept tokens."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ragged:
    """`values` [sum of lengths, ...] holds the rows one after the other, without padding."""

    values: np.ndarray
    lengths: np.ndarray  # int64 [rows]

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], empty: np.ndarray) -> "Ragged":
        """The rows, [length, ...] each. `empty` [0, ...] has the type of the values where there are no rows."""
        return cls(np.concatenate(rows) if rows else empty, np.array([len(row) for row in rows], np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> list[int]:
        """The first value of each row, and the number of all values."""
        return [0, *np.cumsum(self.lengths).tolist()]

    def rows(self) -> list[np.ndarray]:
        """The rows, as views of `values`."""
        starts = self.starts
        return [self.values[start:stop] for start, stop in itertools.pairwise(starts)]

    def take(self, indices: Sequence[int]) -> "Ragged":
        """The rows at `indices`, copied."""
        rows = self.rows()
        return Ragged.of([rows[i] for i in indices], self.values[:0])
