"""The two halves of InternVL against the whole of it: the same tokens, the same answers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.otprune.families import parity
from tests.otprune.families.parity import NEAR, Model, answer, pruned
from tests.tiny import make_internvl

LANDSCAPE, PORTRAIT, SQUARE = (150, 260), (310, 130), (60, 60)  # height, width: 2 x 3 tiles, 2 x 1, and one
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SQUARE]), ("compare the two", [PORTRAIT, SQUARE]))
SHARES = (0.5, 0.3, 0.6)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request, tmp_path_factory) -> Model:
    folder = make_internvl(tmp_path_factory.mktemp(request.param), decoder=request.param)
    processor = GotOcr2ImageProcessorPil.from_pretrained(folder)

    def inputs(sizes):  # as transformers' `InternVLProcessor` asks for them
        pictures = [parity.picture(size) for size in sizes]
        return {"pixel_values": processor(pictures, crop_to_patches=True, return_tensors="pt")["pixel_values"]}

    def written(model, sizes):
        crops = [processor.get_number_of_image_patches(*size, {"crop_to_patches": True}) for size in sizes]
        return [[model.checkpoint.image_token] * (16 * count) for count in crops]

    return parity.load(folder, inputs, written)


# The tower


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (31, 700), (20, 20), (56, 56), (112, 112)])
def test_crops_are_those_of_the_image_processor(model, size):
    """Pixel for pixel: tiles in raster order, and behind several of them the whole picture."""
    frame = model.frame(size)
    found = parity.normalized(model, frame.reshape(-1, *frame.shape[-3:]))
    torch.testing.assert_close(found, model.inputs([size])["pixel_values"], atol=1e-5, rtol=0)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    parity.assert_tokens(model, [LANDSCAPE, PORTRAIT, SQUARE], [112, 48, 16])


@pytest.mark.parametrize(("way", "regions"), [("joint", [1, 1]), ("tiles", [7, 1]), ("grid", [7, 1])])
def test_each_way_has_all_tokens_in_the_order_of_the_whole_model(model, way, regions):
    parity.assert_half_of_each_region_joins(model, [LANDSCAPE, SQUARE], way, regions)


# Prompts


@pytest.mark.parametrize("num_images", [1, 2])
def test_a_prompt_is_the_one_that_transformers_processor_makes(model, num_images):
    """The template writes the image token alone; the processor puts a start and an end around it."""
    tokenizer, parts = model.decoder.tokenizer, [{"type": "image"}] * num_images + [{"type": "text", "text": "what?"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.count("<IMG_CONTEXT>") == num_images
    assert "<img>" not in rendered
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "image_token": "<IMG_CONTEXT>"}
    processor: Any = SimpleNamespace(**names, image_seq_length=16)
    picture = InternVLProcessor.replace_image_token(processor, {"num_patches": [7]}, 0)
    expected = tokenizer(rendered.replace("<IMG_CONTEXT>", picture)).input_ids
    prompt = model.decoder.encode_prompt("what?", num_images=num_images)
    assert model.ids(prompt, [LANDSCAPE] * num_images)[0].tolist() == expected


@pytest.mark.parametrize("conversation", ["plain", "vicuna_v1"])
def test_without_a_template_a_picture_stands_between_its_start_and_end_too(model, conversation):
    before, between, after = model.decoder.encode_prompt("what?", conversation, num_images=2)
    start, end = model.decoder.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    assert (before[-1], between[0], between[-1], after[0]) == (start, end, start, end)
    assert (before.count(start), after.count(end)) == (1, 1)


def test_a_template_that_writes_start_and_end_itself_is_left_as_it_is(model, tmp_path):
    template = (model.checkpoint.path / "chat_template.jinja").read_text()
    expected = model.decoder.encode_prompt("what?", num_images=2)
    wrapped = template.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")
    assert wrapped != template
    (tmp_path / "chat_template.jinja").write_text(wrapped)
    folder, model.decoder.folder = model.decoder.folder, tmp_path
    try:
        assert model.decoder.encode_prompt("what?", num_images=2) == expected
        # Checkpoints converted early write a text that is no token. A message in text then holds the token itself.
        (tmp_path / "chat_template.jinja").write_text(template.replace("<IMG_CONTEXT>", "<image>"))
        found = model.decoder.encode_prompt("what?", num_images=1)
    finally:
        model.decoder.folder = folder
    assert found == model.decoder.encode_prompt("what?", num_images=1)


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    parity.assert_whole_answers(model, PROMPTS)


def test_kept_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    parity.assert_pruned_answers(model, PROMPTS, *pruned(model, PROMPTS, SHARES))


def test_the_same_tokens_in_another_order_give_other_answers(model):
    _, visual = pruned(model, PROMPTS, SHARES)
    found = answer(model, visual, model.prompts(PROMPTS))
    moved = [[(rows.roll(1, 0), span) for rows, span in pictures] for pictures in visual]
    far = (answer(model, moved, model.prompts(PROMPTS)) - found)[:, 0].abs().amax(dim=-1)
    assert (far > 100 * NEAR).all(), far
