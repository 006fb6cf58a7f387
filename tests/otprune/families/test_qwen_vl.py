"""The two halves of Qwen2.5-VL, Qwen3-VL and Qwen3.5 against the whole of them: the same tokens, the same answers.

Hidden tokens keep the positions of their places in the picture.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor

from otprune.families import Span
from otprune.models.decoding import decode
from tests.otprune.families import parity
from tests.otprune.families.parity import NEAR, NEW_TOKENS, Model, answer, pruned
from tests.tiny import MAKERS

FAMILIES = (
    *("qwen2_5_vl", "qwen3_vl", "qwen3_5"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl_moe", "qwen3_5_moe")),
)
LANDSCAPE, PORTRAIT, SQUARE = (150, 260), (310, 130), (200, 200)  # height, width
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [PORTRAIT]), ("compare the two", [PORTRAIT, SQUARE]))
SHARES = (0.5, 0.3, 0.6)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Model:
    folder = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    processor = AutoImageProcessor.from_pretrained(folder)

    def inputs(sizes):
        return dict(processor([parity.picture(size) for size in sizes], return_tensors="pt"))

    def written(model, sizes):
        counts = inputs(sizes)["image_grid_thw"].prod(dim=1) // 4
        return [[model.checkpoint.image_token] * count for count in counts.tolist()]

    return parity.load(folder, inputs, written)


def assert_different(model: Model, found: Tensor, kept: list[list[Tensor]]) -> None:
    """Every first word has other probabilities than by the definition, far beyond rounding; some words are others."""
    expected = torch.stack(parity.definitions(model, PROMPTS, kept))
    far = (found[:, 0].log_softmax(-1) - expected[:, 0].log_softmax(-1)).abs().amax(dim=-1)
    assert (far > 1000 * NEAR).all(), far
    assert found.argmax(-1).tolist() != expected.argmax(-1).tolist()


# The tower


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (31, 700), (20, 20)])
def test_patches_are_those_of_the_image_processor(model, size):
    expected = model.inputs([size])
    frame = model.frame(size)
    found = model.encoder.patchify(frame)
    assert expected["image_grid_thw"].tolist() == [
        [1, frame.shape[0] // model.encoder.patch, frame.shape[1] // model.encoder.patch]
    ]
    torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=0)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    sizes = [LANDSCAPE, PORTRAIT, SQUARE]
    parity.assert_tokens(model, sizes, [grid.prod() // 4 for grid in model.inputs(sizes)["image_grid_thw"]])
    if model.checkpoint.levels:
        output, width = model.features(sizes), model.checkpoint.language.hidden
        for i, rows in enumerate(model.rows(sizes)):
            levels = torch.cat([level[i] for level in output.deepstack_features], dim=1)
            torch.testing.assert_close(rows[:, width:], levels, atol=NEAR, rtol=0)


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    parity.assert_whole_answers(model, PROMPTS)


def test_kept_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    parity.assert_pruned_answers(model, PROMPTS, *pruned(model, PROMPTS, SHARES))


def test_linear_attention_sees_what_a_mask_hides(model):
    """So the reference of the other families is none here, and the test above would fail with it."""
    if model.checkpoint.language.linear is None:
        pytest.skip("every layer attends to every token")
    kept, visual = pruned(model, PROMPTS, SHARES)
    first, (_, sizes) = model.prompts(PROMPTS)[0], PROMPTS[0]
    hidden = parity.definition(model, first, sizes, kept[0], parity.visible_tokens)
    far = (answer(model, visual, model.prompts(PROMPTS))[0, 0].log_softmax(-1) - hidden[0].log_softmax(-1)).abs().max()
    assert far > 1000 * NEAR


def test_what_stands_in_the_padding_changes_no_answer(model):
    """Ours is zeros, which no layer without biases would notice, linear attention or not."""
    generator = torch.Generator().manual_seed(0)
    embeds, mask = torch.randn(2, 30, 64, generator=generator), torch.ones(2, 30, dtype=torch.long)
    mask[0, :20] = 0
    positions = torch.arange(30).expand(3, 2, 30)
    options = {"max_new_tokens": NEW_TOKENS, "end_tokens": []}
    together = decode(model.decoder.model, embeds, mask, positions=positions, **options)
    alone = decode(model.decoder.model, embeds[:1, 20:], mask[:1, 20:], positions=positions[:, :1, 20:], **options)
    assert together[0] == alone[0]
    assert together[0] != together[1]


def test_positions_one_behind_the_other_give_other_answers(model):
    kept, visual = pruned(model, PROMPTS, SHARES)
    compact = [
        [(rows, Span(span.tokens, np.tile(np.arange(len(span)), (3, 1)), len(span))) for rows, span in pictures]
        for pictures in visual
    ]
    assert_different(model, answer(model, compact, model.prompts(PROMPTS)), kept)


def test_text_that_follows_the_kept_tokens_at_once_gives_other_answers(model):
    kept, visual = pruned(model, PROMPTS, SHARES)
    moved = [
        [(rows, Span(span.tokens, span.positions, int(span.positions.max()) + 3)) for rows, span in pictures]
        for pictures in visual
    ]
    assert_different(model, answer(model, moved, model.prompts(PROMPTS)), kept)


def test_without_deep_stack_the_answers_are_others(model):
    if not model.checkpoint.levels:
        pytest.skip("the family has no DeepStack")
    kept, visual = pruned(model, PROMPTS, SHARES)
    width = model.checkpoint.language.hidden
    for pictures in visual:
        for rows, _ in pictures:
            rows[:, width:] = 0
    assert_different(model, answer(model, visual, model.prompts(PROMPTS)), kept)


def test_finished_answers_leave_a_batch_of_three_axes(model):
    """The answers do not change when a word of some of them ends these, and the others go on in a smaller batch."""
    _, visual = pruned(model, PROMPTS, SHARES)
    words = answer(model, visual, model.prompts(PROMPTS)).argmax(-1).tolist()
    last = next(word for row in words for word in row if not all(word in other for other in words))
    model.decoder.end_tokens = [last]
    try:
        found = model.decoder.generate(visual, model.prompts(PROMPTS), max_new_tokens=NEW_TOKENS)
    finally:
        model.decoder.end_tokens = []
    for completion, row in zip(found, words, strict=True):
        until = row.index(last) if last in row else NEW_TOKENS
        assert completion.num_generated_tokens == min(until + 1, NEW_TOKENS)
        assert completion.text == model.decoder.tokenizer.decode(row[:until], skip_special_tokens=True).strip()
    assert {completion.finish_reason for completion in found} == {"stop", "length"}
