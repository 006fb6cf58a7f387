"""Where the tokens of pictures stand in a prompt: rows, positions and DeepStack's rows, by spans."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from otprune.families import Span
from otprune.families.geometry import line_span
from otprune.models import Decoder, load_decoder, read_checkpoint
from otprune.models.decoder import Placed, deep_stack

WIDTH = 192
SEPARATOR = 20  # any token of the demo's text
PROMPT = ([1, 11, 12], [13, 14])


@pytest.fixture(scope="module")
def decoder(demo_model) -> Decoder:
    return load_decoder(demo_model, dtype=torch.float32, device="cpu")


@pytest.fixture
def three_axes(decoder, demo_model) -> Decoder:
    """The decoder of a model that counts positions along three axes."""
    checkpoint = read_checkpoint(str(demo_model))
    checkpoint = replace(checkpoint, geometry=replace(checkpoint.geometry, axes=3))
    return Decoder(checkpoint, decoder.model, decoder.tokenizer)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embedded(decoder: Decoder, ids: list[int]) -> Tensor:
    return decoder.model.get_input_embeddings()(torch.tensor(ids))


def test_rows_without_a_span_stand_between_the_texts_one_position_each(decoder):
    rows = randn(4, WIDTH)
    placed = decoder.place(rows, PROMPT)
    before, after = PROMPT
    assert torch.equal(placed.rows, torch.cat([embedded(decoder, before), rows, embedded(decoder, after)]))
    assert placed.positions.tolist() == [list(range(9))]
    assert placed.is_visual.tolist() == [False] * 3 + [True] * 4 + [False] * 2
    assert placed.deep == ()


def test_a_prompt_without_pictures_is_its_text(decoder):
    placed = decoder.place([], ([5, 6, 7],))
    assert torch.equal(placed.rows, embedded(decoder, [5, 6, 7]))
    assert not placed.is_visual.any()


def test_the_other_tokens_of_a_span_are_text(decoder):
    image, rows = decoder.image_token, randn(3, WIDTH)
    span = line_span(np.array([SEPARATOR, image, image, SEPARATOR, image]))
    placed = decoder.place([(rows, span)], PROMPT)
    separator = embedded(decoder, [SEPARATOR])
    expected = [embedded(decoder, PROMPT[0]), separator, rows[:2], separator, rows[2:], embedded(decoder, PROMPT[1])]
    assert torch.equal(placed.rows, torch.cat(expected))
    assert placed.is_visual.nonzero()[:, 0].tolist() == [4, 5, 7]


def test_each_picture_stands_at_its_place(decoder):
    rows = [randn(count, WIDTH, seed=count) for count in (2, 5)]
    texts = ([1, 2], [3], [4, 5])
    placed = decoder.place(rows, texts)
    first, between, last = (embedded(decoder, text) for text in texts)
    assert torch.equal(placed.rows, torch.cat([first, rows[0], between, rows[1], last]))
    assert placed.positions.tolist() == [list(range(12))]


def test_text_goes_on_where_the_extent_of_a_span_says_on_every_axis(three_axes):
    """A grid of 2 x 3 tokens of which three are kept: it takes three positions, though it has four token ids."""
    image = three_axes.image_token
    grid = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 2, 0, 2]])
    span = Span(np.array([image, image, SEPARATOR, image]), grid, extent=3)
    rows = [(randn(3, WIDTH, seed=i), span) for i in range(2)]
    positions = three_axes.place(rows, ([1, 2], [3], [4, 5])).positions
    text = [0, 1], [5], [9, 10]  # before, between and after: 2 + 3, 6 + 3
    for axis in range(3):
        picture = grid[axis]
        expected = [*text[0], *(picture + 2), *text[1], *(picture + 6), *text[2]]
        assert positions[axis].tolist() == expected


def test_rows_without_a_span_are_refused_where_positions_have_several_axes(three_axes):
    with pytest.raises(ValueError, match="visual tokens must come with spans in a model with 3 axes of positions"):
        three_axes.place(randn(4, WIDTH), PROMPT)


@pytest.mark.parametrize("count", [0, 2])
def test_a_prompt_gets_as_many_pictures_as_it_has_places(decoder, count):
    with pytest.raises(ValueError, match=f"the prompt must get 1 images, got {count}"):
        decoder.place([randn(4, WIDTH)] * count, PROMPT)


def test_what_is_behind_a_rows_width_is_deepstacks_level_by_level(decoder):
    rows = randn(4, 3 * WIDTH)
    placed = decoder.place(rows, PROMPT)
    assert torch.equal(placed.rows[placed.is_visual], rows[:, :WIDTH])
    assert len(placed.deep) == 2
    assert torch.equal(placed.deep[0], rows[:, WIDTH : 2 * WIDTH])
    assert torch.equal(placed.deep[1], rows[:, 2 * WIDTH :])


def test_a_batchs_levels_follow_its_left_padded_mask(decoder):
    rows = [randn(count, 2 * WIDTH, seed=count) for count in (4, 1)]
    placed = [decoder.place(visual, PROMPT) for visual in rows]
    arguments = deep_stack(placed)
    mask = arguments["visual_pos_masks"]
    assert mask.tolist() == [[False] * 3 + [True] * 4 + [False] * 2, [False] * 6 + [True] + [False] * 2]
    (level,) = arguments["deepstack_visual_embeds"]
    assert torch.equal(level, torch.cat([visual[:, WIDTH:] for visual in rows]))
    assert deep_stack([Placed(randn(2, WIDTH), torch.zeros(1, 2), torch.zeros(2, dtype=torch.bool))]) == {}


# Answers


def test_a_span_of_image_tokens_answers_as_rows_without_one(decoder):
    prompt, rows = decoder.encode_prompt("describe the image ."), randn(6, WIDTH)
    span = line_span(np.full(6, decoder.image_token))
    with_span = decoder.generate([[(rows, span)]], [prompt], max_new_tokens=8)
    assert with_span == decoder.generate([rows], [prompt], max_new_tokens=8)


def test_a_spans_other_tokens_answer_as_if_they_stood_in_the_text(decoder):
    before, after = decoder.encode_prompt("describe the image .")
    rows, image = randn(6, WIDTH), decoder.image_token
    span = line_span(np.array([SEPARATOR, *[image] * 6, SEPARATOR + 1]))
    other = randn(2, WIDTH, seed=1)  # a shorter prompt in the same batch
    got = decoder.generate(
        [[(rows, span)], [(other, line_span(np.full(2, image)))]], [(before, after)] * 2, max_new_tokens=12
    )
    texts = ([*before, SEPARATOR], [SEPARATOR + 1, *after])
    expected = [
        decoder.generate([visual], [prompt], max_new_tokens=12)[0]
        for visual, prompt in ((rows, texts), (other, (before, after)))
    ]
    assert got == expected
    assert got[0].num_prompt_tokens == len(before) + len(span) + len(after)
