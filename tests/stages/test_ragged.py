"""Rows of different lengths in one array: each comes back as it was, and nothing is copied that need not be."""

import numpy as np
import pytest

from pipelines.stages.ragged import Ragged

ROWS = [np.arange(6).reshape(3, 2), np.empty((0, 2), int), np.full((1, 2), 9), np.arange(10).reshape(5, 2)]
EMPTY = np.empty((0, 2), int)


def test_rows_come_back_in_order_and_the_array_holds_nothing_else():
    ragged = Ragged.of(ROWS, EMPTY)
    assert len(ragged) == 4
    assert ragged.lengths.dtype == np.int64
    assert ragged.lengths.tolist() == [3, 0, 1, 5]
    assert ragged.starts == [0, 3, 3, 4, 9]
    assert ragged.values.shape == (9, 2)
    for got, row in zip(ragged.rows(), ROWS, strict=True):
        np.testing.assert_array_equal(got, row)


def test_rows_are_views_of_the_values():
    ragged = Ragged.of(ROWS, EMPTY)
    ragged.rows()[2][:] = -1
    assert ragged.values[3].tolist() == [-1, -1]


@pytest.mark.parametrize("indices", [[], [0], [3, 1, 0], [2, 2, 3, 2]])
def test_taken_rows_are_copies_in_the_order_asked_for(indices):
    ragged = Ragged.of(ROWS, EMPTY)
    taken = ragged.take(indices)
    assert len(taken) == len(indices)
    for got, index in zip(taken.rows(), indices, strict=True):
        np.testing.assert_array_equal(got, ROWS[index])
    taken.values[:] = -1
    np.testing.assert_array_equal(ragged.values, np.concatenate(ROWS))


def test_without_rows_the_values_have_the_type_and_width_they_would_have():
    for ragged in (Ragged.of([], EMPTY), Ragged.of(ROWS, EMPTY).take([])):
        assert (len(ragged), ragged.rows(), ragged.starts) == (0, [], [0])
        assert (ragged.values.shape, ragged.values.dtype) == ((0, 2), EMPTY.dtype)
