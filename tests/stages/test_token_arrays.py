"""Kept tokens on their way between stages: packed without padding, and unpacked image by image, prompt by prompt."""

import numpy as np
import pytest
import torch

from otprune.models import Kept
from pipelines.output.unit import Unit
from pipelines.stages.token_arrays import from_numpy, pack, to_numpy, unpack
from pipelines.stages.unit_batch import Image, QuestionSet, UnitBatch

SIZES = [(9, 9), (40, 7)]


def kept(*counts: int) -> list[Kept]:
    """Random tokens of width 3; the first of each picture has no place of its own."""
    return [Kept(torch.randn(count, 3), torch.arange(count) - 1, 100) for count in counts]


def unit_of(rows: list[Kept], num_images: int, rows_per_prompt: bool = False) -> UnitBatch:
    """Images of two pictures and two prompts, back from a row, with `rows` in their arrays."""
    asked = QuestionSet([], 2)
    images = [Image(str(i), "a", i, "0" * 64, ["x", "y"], sizes=SIZES, question_set=asked) for i in range(num_images)]
    unit = Unit("0123456789ab", 0, num_images, ("a",))
    unit_batch = UnitBatch(unit, images=images, rows_per_prompt=rows_per_prompt, arrays=pack(rows, 3, torch.float32))
    return UnitBatch.from_row(unit_batch.to_row())


def assert_are(pictures: list, rows: list[Kept]) -> None:
    assert [picture.size for picture in pictures] == SIZES
    for picture, row in zip(pictures, rows, strict=True):
        assert torch.equal(picture.tokens, row.tokens)
        assert picture.kept.dtype == np.int32
        assert picture.kept.tolist() == row.source.tolist()


def test_rows_of_different_length_come_back_as_they_were():
    rows = kept(2, 4, 1, 3)
    for image, pair in zip(unpack(unit_of(rows, 2)), (rows[:2], rows[2:]), strict=True):
        for pictures in image:  # both prompts get the same rows
            assert_are(pictures, pair)


def test_each_prompt_gets_its_own_rows_if_the_method_looks_at_the_prompt():
    rows = kept(2, 4, 1, 3, 5, 6, 8, 7)
    (first, second), (third, fourth) = unpack(unit_of(rows, 2, rows_per_prompt=True))
    for number, pictures in enumerate((first, second, third, fourth)):
        assert_are(pictures, rows[2 * number : 2 * number + 2])


def test_nothing_is_padded_and_nothing_is_copied_on_the_way_back():
    unit_batch = unit_of(kept(2, 400), 1)
    assert unit_batch.arrays["tokens"].values.shape == (402, 3)
    assert unit_batch.arrays["kept"].values.shape == (402,)
    [[pictures, _]] = unpack(unit_batch)
    for picture in pictures:
        assert np.shares_memory(picture.tokens.numpy(), unit_batch.arrays["tokens"].values)
        assert np.shares_memory(picture.kept, unit_batch.arrays["kept"].values)


def test_a_picture_of_which_nothing_is_kept_has_an_empty_row():
    rows = kept(0, 3)
    [[pictures, _]] = unpack(unit_of(rows, 1))
    assert_are(pictures, rows)


def test_without_rows_the_arrays_have_the_types_they_would_have():
    arrays = pack([], 5, torch.bfloat16)
    assert (arrays["tokens"].values.shape, arrays["tokens"].values.dtype) == ((0, 5), np.int16)
    assert (arrays["kept"].values.shape, arrays["kept"].values.dtype) == ((0,), np.int32)
    assert len(arrays["tokens"]) == len(arrays["kept"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_survive_the_trip_through_numpy_bit_for_bit(dtype):
    tokens = torch.randn(3, 5, 7).to(dtype)
    tokens[0, 0, :2] = torch.tensor([torch.inf, -0.0])
    array = to_numpy(tokens)
    array.setflags(write=False)  # as arrays come out of the object store
    assert torch.equal(from_numpy(array), tokens)
    assert torch.equal(from_numpy(array[::2]), tokens[::2])
