"""Prompts around pictures, as the language model gets them: rows, positions, visual rows, DeepStack's rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from otprune.families import Span
from otprune.models import load_decoder

WIDTH = 192  # of the demo's language model
BEFORE, BETWEEN, AFTER = [1, 7, 8], [9], [10, 11]
START, END = 12, 13  # text tokens that a family puts around a picture


@pytest.fixture(scope="module")
def decoder(demo_model):
    return load_decoder(demo_model, dtype=torch.float32, device="cpu")


@pytest.fixture
def on_three_axes(decoder, monkeypatch):
    """The decoder as one of a model with M-RoPE."""
    monkeypatch.setattr(decoder, "axes", 3)
    return decoder


def tokens(count: int, levels: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH * (1 + levels))


def words(decoder, ids: list[int]) -> torch.Tensor:
    return decoder.model.get_input_embeddings()(torch.tensor(ids)).detach()


def grid_span(decoder, extent: int) -> Span:
    """Two of a picture's 3 x 4 tokens, at (0, 1) and (2, 3), between a start and an end token."""
    image = decoder.image_token
    places = [[0, 1, 1, 5], [0, 1, 3, 5], [0, 2, 4, 5]]
    return Span(np.array([START, image, image, END]), np.array(places), extent)


def plain_span(decoder, count: int) -> Span:
    return Span(np.full(count, decoder.image_token), np.arange(count)[None], count)


def test_rows_without_spans_take_one_position_each(decoder):
    first, second = tokens(2), tokens(3)
    placed = decoder.place([first, second], (BEFORE, BETWEEN, AFTER))
    expected = [words(decoder, BEFORE), first, words(decoder, BETWEEN), second, words(decoder, AFTER)]
    assert torch.equal(placed.rows, torch.cat(expected))
    assert placed.positions.tolist() == [list(range(11))]
    assert placed.is_visual.tolist() == [False] * 3 + [True] * 2 + [False] + [True] * 3 + [False] * 2
    assert placed.deep == ()


def test_a_lone_tensor_is_the_one_picture_of_its_prompt(decoder):
    picture = tokens(4)
    alone, listed = decoder.place(picture, (BEFORE, AFTER)), decoder.place([picture], (BEFORE, AFTER))
    assert torch.equal(alone.rows, listed.rows)
    assert torch.equal(alone.positions, listed.positions)


def test_a_span_brings_its_own_text_and_its_positions_count_from_where_it_begins(on_three_axes):
    """The text behind a picture goes on at the picture's extent, whatever the number of kept tokens."""
    picture = tokens(2)
    placed = on_three_axes.place([(picture, grid_span(on_three_axes, extent=6))], (BEFORE, AFTER))
    expected = [words(on_three_axes, [*BEFORE, START]), picture, words(on_three_axes, [END, *AFTER])]
    assert torch.equal(placed.rows, torch.cat(expected))
    assert placed.positions.tolist() == [
        [0, 1, 2, 3, 4, 4, 8, 9, 10],
        [0, 1, 2, 3, 4, 6, 8, 9, 10],
        [0, 1, 2, 3, 5, 7, 8, 9, 10],
    ]
    assert placed.is_visual.nonzero().flatten().tolist() == [4, 5]


def test_the_span_of_a_second_picture_begins_where_the_first_one_and_the_text_end(on_three_axes):
    pair = [(tokens(2), grid_span(on_three_axes, extent)) for extent in (6, 9)]
    placed = on_three_axes.place(pair, (BEFORE, BETWEEN, AFTER))
    second = torch.from_numpy(pair[1][1].positions) + len(BEFORE) + 6 + len(BETWEEN)
    assert torch.equal(placed.positions[:, 8:12], second)
    assert placed.positions[:, 7].tolist() == [3 + 6] * 3
    assert placed.positions[:, 12:].tolist() == [[3 + 6 + 1 + 9, 3 + 6 + 1 + 10]] * 3


def test_deepstacks_rows_are_split_off_level_by_level_for_all_pictures(decoder):
    first, second = tokens(2, levels=3), tokens(3, levels=3)
    placed = decoder.place([first, second], (BEFORE, BETWEEN, AFTER))
    every = torch.cat([first, second]).unflatten(1, (4, WIDTH))
    assert torch.equal(placed.rows[placed.is_visual], every[:, 0])
    assert len(placed.deep) == 3
    for level, rows in enumerate(placed.deep, start=1):
        assert torch.equal(rows, every[:, level])


def test_a_prompt_without_pictures_is_its_text(decoder):
    placed = decoder.place([], (BEFORE,))
    assert torch.equal(placed.rows, words(decoder, BEFORE))
    assert not placed.is_visual.any()
    assert placed.deep == ()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_prompt_gets_as_many_pictures_as_it_has_places(decoder, count):
    with pytest.raises(ValueError, match=f"the prompt must get 2 images, got {count}"):
        decoder.place([tokens(2)] * count, (BEFORE, BETWEEN, AFTER))


def test_with_several_axes_rows_must_come_with_spans(on_three_axes):
    with pytest.raises(ValueError, match="visual tokens must come with spans in a model with 3 axes of positions"):
        on_three_axes.place(tokens(2), (BEFORE, AFTER))


def test_a_span_of_plain_positions_changes_no_answer(decoder, demo_model):
    prompt = decoder.encode_prompt("describe the image .")
    picture = tokens(5)
    span = plain_span(decoder, 5)
    plain, spanned = decoder.generate([picture, [(picture, span)]], [prompt] * 2, max_new_tokens=6)
    assert plain == spanned
    longer = replace(span, tokens=np.array([START, *span.tokens]), positions=np.arange(6)[None], extent=6)
    (around,) = decoder.generate([[(picture, longer)]], [prompt], max_new_tokens=6)
    assert around.num_prompt_tokens == plain.num_prompt_tokens + 1
