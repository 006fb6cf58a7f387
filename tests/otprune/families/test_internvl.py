"""The two halves of InternVL against the whole of it: the same tokens, the same answers.

What is left of pruned pictures is compared with the definition of pruning: the whole prompt, whose pruned tokens nobody
can see, with the visible ones counted as positions, computed anew for each word without a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from otprune.families import Span
from otprune.models import Checkpoint, Decoder, Encoder, Kept, Prompt, load_decoder, load_encoder, read_checkpoint
from pipelines.images.frames import render
from pipelines.images.resize import Raster
from tests.tiny import make_internvl

CPU = {"dtype": torch.float32, "device": "cpu"}
NEW_TOKENS = 8
NEAR = 1e-4  # float32 on a CPU, where the order of sums differs
LANDSCAPE, PORTRAIT, SQUARE = (150, 260), (310, 130), (60, 60)  # height, width: 2 x 3 tiles, 2 x 1, and one
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SQUARE]), ("compare the two", [PORTRAIT, SQUARE]))
SHARES = (0.5, 0.3, 0.6)


@dataclass
class Model:
    """The two halves, the whole, and what transformers' image processor makes of pictures."""

    checkpoint: Checkpoint
    encoder: Encoder
    decoder: Decoder
    whole: Any
    processor: Any

    def pixels(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """[crops of all pictures, 3, side, side], as transformers' `InternVLProcessor` asks for them."""
        found = self.processor([picture(size) for size in sizes], crop_to_patches=True, return_tensors="pt")
        return found["pixel_values"]

    def rows(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        regions = self.encoder.regions([self.frame(size) for size in sizes], sizes, "joint")
        return [region.features for (region,) in regions]

    def frame(self, size: tuple[int, int]) -> Tensor:
        geometry = self.checkpoint.geometry
        raster = Raster(picture(size), size[1], size[0])
        return torch.from_numpy(render(raster, geometry.frame(size), geometry.background))

    def span(self, size: tuple[int, int], kept: Tensor) -> Span:
        return self.checkpoint.geometry.span(size, kept.numpy(), self.checkpoint.image_token)

    def ids(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Ids [1, L] of a whole prompt, with as many image tokens as transformers expects."""
        ids = list(prompt[0])
        for size, text in zip(sizes, prompt[1:], strict=True):
            crops = self.processor.get_number_of_image_patches(*size, {"crop_to_patches": True})
            ids += [self.checkpoint.image_token] * (crops * 16) + text
        return torch.tensor([ids])


def picture(size: tuple[int, int]) -> Image.Image:
    height, width = size
    coarse = np.random.default_rng(height + width).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request, tmp_path_factory) -> Model:
    folder = make_internvl(tmp_path_factory.mktemp(request.param), decoder=request.param)
    checkpoint = read_checkpoint(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    decoder = load_decoder(checkpoint, **CPU)
    decoder.end_tokens = []  # every answer has NEW_TOKENS tokens
    processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
    return Model(checkpoint, load_encoder(checkpoint, **CPU), decoder, whole, processor)


def answer(model: Model, visual: list[list[tuple[Tensor, Span]]], prompts: list[Prompt]) -> Tensor:
    """The logits [B, NEW_TOKENS, V] of a batch that the decoder generates together."""
    seen: list[Tensor] = []
    hook = model.decoder.model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[:, -1]))
    try:
        completions = model.decoder.generate(visual, prompts, max_new_tokens=NEW_TOKENS)
    finally:
        hook.remove()
    logits = torch.stack(seen, dim=1)
    for completion, ids in zip(completions, logits.argmax(-1).tolist(), strict=True):
        assert completion.text == model.decoder.completion(0, ids).text
    return logits


def pruned(model: Model, shares: Sequence[float]) -> tuple[list[list[Tensor]], list[list[tuple[Tensor, Span]]]]:
    """(indices, rows and spans) of a random part of each picture, ascending."""

    def some(share: float, size: tuple[int, int]) -> Tensor:
        count = model.checkpoint.geometry.num_visual(size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return order[: max(1, round(share * count))].sort().values

    kept = [[some(share, size) for size in sizes] for share, (_, sizes) in zip(shares, PROMPTS, strict=True)]
    visual = [
        [
            (rows[index], model.span(size, index))
            for rows, size, index in zip(model.rows(sizes), sizes, indices, strict=True)
        ]
        for indices, (_, sizes) in zip(kept, PROMPTS, strict=True)
    ]
    return kept, visual


def encoded(model: Model) -> list[Prompt]:
    return [model.decoder.encode_prompt(text, num_images=len(sizes)) for text, sizes in PROMPTS]


@torch.inference_mode()
def definition(model: Model, prompt: Prompt, sizes: Sequence[tuple[int, int]], kept: list[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt in which only `kept` of each picture's tokens can be seen."""
    inner, ids = model.whole.model, model.ids(prompt, sizes)
    features = inner.get_image_features(model.pixels(sizes), return_dict=True).pooler_output.flatten(0, 1)
    is_image = ids[0] == model.checkpoint.image_token
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    seen = [torch.zeros(model.checkpoint.geometry.num_visual(size), dtype=torch.bool) for size in sizes]
    for mask, index in zip(seen, kept, strict=True):
        mask[index] = True
    visible[is_image] = torch.cat(seen)
    logits = []
    for _ in range(NEW_TOKENS):
        length = ids.shape[1]
        can_see = (torch.ones(length, length).tril().bool() & visible) | torch.eye(length, dtype=torch.bool)
        embeds = inner.get_input_embeddings()(ids)
        embeds[0, is_image] = features
        hidden = inner.language_model(
            inputs_embeds=embeds,
            position_ids=(visible.cumsum(0) - 1).clamp(min=0)[None],
            attention_mask=can_see[None, None],
            use_cache=False,
        ).last_hidden_state
        logits.append(model.whole.lm_head(hidden[0, -1]))
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
        visible = torch.cat([visible, visible.new_ones(1)])
        is_image = torch.cat([is_image, is_image.new_zeros(1)])  # even if the word is the image token
    return torch.stack(logits)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=NEAR, rtol=0)


# The tower


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (31, 700), (20, 20), (56, 56), (112, 112)])
def test_crops_are_those_of_the_image_processor(model, size):
    """Pixel for pixel: tiles in raster order, and behind several of them the whole picture."""
    frame = model.frame(size)
    crops = frame.reshape(-1, *frame.shape[-3:])
    mean, std = torch.tensor(model.checkpoint.mean), torch.tensor(model.checkpoint.std)
    found = ((crops.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, model.pixels([size]), atol=1e-5, rtol=0)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    sizes = [LANDSCAPE, PORTRAIT, SQUARE]
    with torch.inference_mode():
        expected = model.whole.model.get_image_features(model.pixels(sizes), return_dict=True).pooler_output
    counts = [model.checkpoint.geometry.num_visual(size) for size in sizes]
    assert counts == [112, 48, 16]
    found = model.rows(sizes)
    for tokens, whole in zip(found, expected.flatten(0, 1).split(counts), strict=True):
        torch.testing.assert_close(tokens, whole, atol=NEAR, rtol=0)
        assert tokens.shape[1] == model.checkpoint.row_width == model.encoder.row_width
    torch.testing.assert_close(found[1], *model.rows([PORTRAIT]), atol=NEAR, rtol=0)


@pytest.mark.parametrize("way", ["joint", "tiles", "grid"])
def test_each_way_has_all_tokens_in_the_order_of_the_whole_model(model, way):
    """Half of each region is dropped; what is left says where it came from."""
    sizes = [LANDSCAPE, SQUARE]
    regions = model.encoder.regions([model.frame(size) for size in sizes], sizes, way)
    assert [len(each) for each in regions] == ([1, 1] if way == "joint" else [7, 1])
    for size, whole, parts in zip(sizes, model.rows(sizes), regions, strict=True):
        kept = []
        for region in parts:
            source = torch.arange(0, len(region.features), 2)
            kept.append(Kept(region.features[source], source, len(region.features)))
        joined = model.encoder.join(size, kept, way)
        assert joined.source.tolist() == list(range(0, model.checkpoint.geometry.num_visual(size), 2))
        assert joined.num_visual == model.checkpoint.geometry.num_visual(size)
        torch.testing.assert_close(joined.tokens, whole[joined.source], atol=0, rtol=0)


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
    _, visual = pruned(model, (1.0, 1.0, 1.0))
    found = answer(model, visual, encoded(model))
    for i, (prompt, (_, sizes)) in enumerate(zip(encoded(model), PROMPTS, strict=True)):
        ids = model.ids(prompt, sizes)
        expected = model.whole.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=model.pixels(sizes),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert found[i].argmax(-1).tolist() == expected.sequences[0, ids.shape[1] :].tolist()
        assert_same(found[i], torch.cat(expected.logits))


def test_kept_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    kept, visual = pruned(model, SHARES)
    assert len({sum(map(len, indices)) for indices in kept}) == len(PROMPTS)  # the batch is ragged
    found = answer(model, visual, encoded(model))
    cases = zip(found, encoded(model), PROMPTS, kept, strict=True)
    for logits, prompt, (_, sizes), indices in cases:
        assert_same(logits, definition(model, prompt, sizes, indices))
        assert len(set(logits.argmax(-1).tolist())) > 2  # a model that repeats one word would prove nothing


def test_the_same_tokens_in_another_order_give_other_answers(model):
    _, visual = pruned(model, SHARES)
    found = answer(model, visual, encoded(model))
    moved = [[(rows.roll(1, 0), span) for rows, span in pictures] for pictures in visual]
    far = (answer(model, moved, encoded(model)) - found)[:, 0].abs().amax(dim=-1)
    assert (far > 100 * NEAR).all(), far
