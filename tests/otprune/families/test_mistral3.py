"""The two halves of Mistral-Small-3 against the whole of it: the same tokens, the same prompts, the same answers.

Of the ends of rows, those can be seen that end a row with visible tokens, but for the last such row, which the
picture's end ends.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from otprune.families import Span
from otprune.families.geometry import line_span
from otprune.models import Kept
from tests.otprune.families import parity
from tests.otprune.families.parity import NEAR, Model, Size, answer, pruned
from tests.tiny import make_mistral3

with pytest.MonkeyPatch.context() as patch:  # the module of transformers' processor imports torchvision for pictures
    patch.setattr("transformers.utils.is_vision_available", lambda: False)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

LANDSCAPE, PORTRAIT, SMALL = (130, 260), (310, 100), (60, 40)  # height, width: 6 x 11 tokens, 11 x 4, and 5 x 3
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SMALL]), ("compare the two", [PORTRAIT, SMALL]))
SHARES = (0.5, 0.2, 0.1)  # the last leaves rows without a token


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = make_mistral3(tmp_path_factory.mktemp("mistral3"))
    processor = PixtralImageProcessorPil.from_pretrained(folder)

    def inputs(sizes):  # pixels and sizes of the resized pictures, as transformers' `PixtralProcessor` asks for them
        return dict(processor([parity.picture(size) for size in sizes], patch_size=14, return_tensors="pt"))

    def written(model, sizes):
        return [model.decoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts_of(model, sizes)]

    return parity.load(folder, inputs, written)


def texts_of(model: Model, sizes: Sequence[Size]) -> list[str]:
    """What transformers' processor writes for each picture."""
    names = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    processor: Any = SimpleNamespace(**names, patch_size=7, spatial_merge_size=2)
    inputs = {"image_sizes": model.inputs(sizes)["image_sizes"]}
    return [PixtralProcessor.replace_image_token(processor, inputs, i) for i in range(len(sizes))]


def token_id(model: Model, text: str) -> int:
    return model.decoder.tokenizer.convert_tokens_to_ids(text)


def visible_ids(model: Model, ids: list[int], kept: list[Tensor], sizes: Sequence[Size]) -> Tensor:
    """bool [L]: which of a whole prompt's ids can be seen, walking through it id by id."""
    image, row_break, end = model.checkpoint.image_token, token_id(model, "[IMG_BREAK]"), token_id(model, "[IMG_END]")
    visible, number, pictures = torch.ones(len(ids), dtype=torch.bool), 0, iter(kept)
    row, break_of_last_row = False, None  # whether the row has a visible token; place of the last visible break
    indices: set[int] | None = None
    for place, token in enumerate(ids):
        if token == image:
            indices = set(next(pictures).tolist()) if indices is None else indices
            visible[place] = number in indices
            row, number = row or number in indices, number + 1
        elif token == row_break:
            visible[place] = row
            break_of_last_row, row = place if row else break_of_last_row, False
        elif token == end:
            if not row:  # the last row keeps nothing, so the picture's end ends the last row that does
                assert break_of_last_row is not None
                visible[break_of_last_row] = False
            row, break_of_last_row, indices, number = False, None, None, 0
    return visible


# The tower


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SMALL, (31, 700), (20, 20), (1, 3), (150, 150)])
def test_pixels_are_those_of_the_image_processor(model, size):
    frame, expected = model.frame(size), model.inputs([size])
    assert expected["image_sizes"].tolist() == [list(frame.shape[:2])]
    torch.testing.assert_close(parity.normalized(model, frame[None]), expected["pixel_values"], atol=1e-5, rtol=0)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    """Two of them share a frame, and so a batch, but not their tokens."""
    sizes = [LANDSCAPE, PORTRAIT, SMALL, (140, 280), PORTRAIT[::-1]]
    parity.assert_tokens(model, sizes, [66, 44, 15, 66, 44])
    found = model.rows(sizes)
    assert not torch.allclose(found[0], found[3], atol=100 * NEAR)


def test_a_picture_is_one_region(model):
    [[region]] = model.encoder.regions([model.frame(SMALL)], [SMALL], "joint")
    kept = Kept(region.features[[0, 7]], torch.tensor([0, 7]), 15)
    assert model.encoder.join(SMALL, [kept], "joint") is kept


# Prompts


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_prompt_is_the_one_that_transformers_processor_makes(model, num_images):
    """With every token kept, spans in the prompt are what the processor writes; <s> stands there once."""
    tokenizer, sizes = model.decoder.tokenizer, [LANDSCAPE, SMALL][:num_images]
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": "what?"}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    for text in texts_of(model, sizes):
        rendered = rendered.replace("[IMG]", text.replace("[IMG]", "@"), 1)
    expected = tokenizer(rendered.replace("@", "[IMG]"), add_special_tokens=False).input_ids
    first, *texts = model.decoder.encode_prompt("what?", num_images=num_images)
    ids = list(first)
    for size, text in zip(sizes, texts, strict=True):
        count = model.checkpoint.geometry.num_visual(size)
        ids += model.span(size, torch.arange(count)).tokens.tolist() + text
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == 1


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    parity.assert_whole_answers(model, PROMPTS)


def test_kept_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    kept, visual = pruned(model, PROMPTS, SHARES)
    rows_left = [len(set((kept[2][0] // 4).tolist())), len(set((kept[1][0] // 3).tolist()))]
    assert rows_left[0] < 11, "rows of the tall picture are empty"
    assert rows_left[1] < 5
    parity.assert_pruned_answers(model, PROMPTS, kept, visual, visible_of=visible_ids)


@pytest.mark.parametrize("ends", ["no break", "no end", "a break of every row"])
def test_other_ends_of_rows_give_other_answers(model, ends):
    kept, visual = pruned(model, PROMPTS, SHARES)
    found, image = answer(model, visual, model.prompts(PROMPTS)), model.checkpoint.image_token

    def other(size: tuple[int, int], indices: Tensor, span: Span) -> Span:
        rows, columns = model.checkpoint.geometry.grid(size)
        if ends != "a break of every row":
            dropped = token_id(model, "[IMG_BREAK]" if ends == "no break" else "[IMG_END]")
            return line_span(span.tokens[span.tokens != dropped])
        each = np.bincount(indices.numpy() // columns, minlength=rows)
        tokens = [token for count in each for token in [*[image] * count, token_id(model, "[IMG_BREAK]")]]
        return line_span(np.array([*tokens[:-1], token_id(model, "[IMG_END]")]))

    changed = [
        [(rows, other(size, index, span)) for (rows, span), size, index in zip(pictures, sizes, indices, strict=True)]
        for pictures, (_, sizes), indices in zip(visual, PROMPTS, kept, strict=True)
    ]
    far = (answer(model, changed, model.prompts(PROMPTS)) - found)[:, 0].abs().amax(dim=-1)
    moved = torch.tensor([sum(len(span) for _, span in pictures) for pictures in changed]) != torch.tensor(
        [sum(len(span) for _, span in pictures) for pictures in visual]
    )
    assert moved.sum() >= 2
    assert (far[moved] > 100 * NEAR).all(), far
