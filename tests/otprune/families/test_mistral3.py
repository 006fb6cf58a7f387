"""The two halves of Mistral-Small-3 against the whole of it: the same tokens, the same prompts, the same answers.

What is left of pruned pictures is compared with the definition of pruning: the whole prompt, whose pruned tokens nobody
can see, with the visible ones counted as positions, computed anew for each word without a cache. Of the ends of rows,
those can be seen that end a row with visible tokens, but for the last such row, which the picture's end ends.
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
from transformers import AutoModelForImageTextToText
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from otprune.families import Span
from otprune.families.geometry import line_span
from otprune.models import Checkpoint, Decoder, Encoder, Kept, Prompt, load_decoder, load_encoder, read_checkpoint
from pipelines.images.frames import render
from pipelines.images.resize import Raster
from tests.tiny import make_mistral3

with pytest.MonkeyPatch.context() as patch:  # the module of transformers' processor imports torchvision for pictures
    patch.setattr("transformers.utils.is_vision_available", lambda: False)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

CPU = {"dtype": torch.float32, "device": "cpu"}
NEW_TOKENS = 8
NEAR = 1e-4  # float32 on a CPU, where the order of sums differs
LANDSCAPE, PORTRAIT, SMALL = (130, 260), (310, 100), (60, 40)  # height, width: 6 x 11 tokens, 11 x 4, and 5 x 3
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SMALL]), ("compare the two", [PORTRAIT, SMALL]))
SHARES = (0.5, 0.2, 0.1)  # the last leaves rows without a token


@dataclass
class Model:
    """The two halves, the whole, and what transformers' processors make of pictures."""

    checkpoint: Checkpoint
    encoder: Encoder
    decoder: Decoder
    whole: Any
    processor: Any

    def inputs(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Pixels and sizes of the resized pictures, as transformers' `PixtralProcessor` asks for them."""
        return dict(self.processor([picture(size) for size in sizes], patch_size=14, return_tensors="pt"))

    def frame(self, size: tuple[int, int]) -> Tensor:
        geometry = self.checkpoint.geometry
        raster = Raster(picture(size), size[1], size[0])
        return torch.from_numpy(render(raster, geometry.frame(size), geometry.background))

    def rows(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        regions = self.encoder.regions([self.frame(size) for size in sizes], sizes, "joint")
        return [region.features for (region,) in regions]

    def span(self, size: tuple[int, int], kept: Tensor) -> Span:
        return self.checkpoint.geometry.span(size, kept.numpy(), self.checkpoint.image_token)

    def id(self, token: str) -> int:
        return self.decoder.tokenizer.convert_tokens_to_ids(token)

    def text(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """What transformers' processor writes for each picture."""
        names = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
        processor: Any = SimpleNamespace(**names, patch_size=7, spatial_merge_size=2)
        inputs = {"image_sizes": self.inputs(sizes)["image_sizes"]}
        return [PixtralProcessor.replace_image_token(processor, inputs, i) for i in range(len(sizes))]

    def ids(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Ids [1, L] of a whole prompt, with the pictures as transformers' processor writes them."""
        ids = list(prompt[0])
        for written, text in zip(self.text(sizes), prompt[1:], strict=True):
            ids += self.decoder.tokenizer(written, add_special_tokens=False).input_ids + text
        return torch.tensor([ids])


def picture(size: tuple[int, int]) -> Image.Image:
    height, width = size
    coarse = np.random.default_rng(height + width).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = make_mistral3(tmp_path_factory.mktemp("mistral3"))
    checkpoint = read_checkpoint(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    decoder = load_decoder(checkpoint, **CPU)
    decoder.end_tokens = []  # every answer has NEW_TOKENS tokens
    processor = PixtralImageProcessorPil.from_pretrained(folder)
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


def visible_ids(model: Model, ids: list[int], kept: list[Tensor]) -> Tensor:
    """bool [L]: which of a whole prompt's ids can be seen, walking through it id by id."""
    image, row_break, end = model.checkpoint.image_token, model.id("[IMG_BREAK]"), model.id("[IMG_END]")
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


@torch.inference_mode()
def definition(model: Model, prompt: Prompt, sizes: Sequence[tuple[int, int]], kept: list[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt in which only `kept` of each picture's tokens can be seen."""
    inner, ids = model.whole.model, model.ids(prompt, sizes)
    features = torch.cat(list(inner.get_image_features(**model.inputs(sizes), return_dict=True).pooler_output))
    visible = visible_ids(model, ids[0].tolist(), kept)
    is_image = ids[0] == model.checkpoint.image_token
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


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SMALL, (31, 700), (20, 20), (1, 3), (150, 150)])
def test_pixels_are_those_of_the_image_processor(model, size):
    frame, expected = model.frame(size), model.inputs([size])
    mean, std = torch.tensor(model.checkpoint.mean), torch.tensor(model.checkpoint.std)
    found = ((frame.float() / 255 - mean) / std).permute(2, 0, 1)
    assert expected["image_sizes"].tolist() == [list(frame.shape[:2])]
    torch.testing.assert_close(found[None], expected["pixel_values"], atol=1e-5, rtol=0)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    """Two of them share a frame, and so a batch, but not their tokens."""
    sizes = [LANDSCAPE, PORTRAIT, SMALL, (140, 280), PORTRAIT[::-1]]
    with torch.inference_mode():
        expected = model.whole.model.get_image_features(**model.inputs(sizes), return_dict=True).pooler_output
    assert [len(whole) for whole in expected] == [66, 44, 15, 66, 44]
    found = model.rows(sizes)
    for tokens, whole, size in zip(found, expected, sizes, strict=True):
        torch.testing.assert_close(tokens, whole, atol=NEAR, rtol=0)
        assert tokens.shape == (model.checkpoint.geometry.num_visual(size), model.checkpoint.row_width)
    assert model.encoder.row_width == model.checkpoint.row_width == 64
    torch.testing.assert_close(found[1], *model.rows([PORTRAIT]), atol=NEAR, rtol=0)
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
    for written in model.text(sizes):
        rendered = rendered.replace("[IMG]", written.replace("[IMG]", "@"), 1)
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
    _, visual = pruned(model, (1.0, 1.0, 1.0))
    found = answer(model, visual, encoded(model))
    for i, (prompt, (_, sizes)) in enumerate(zip(encoded(model), PROMPTS, strict=True)):
        ids = model.ids(prompt, sizes)
        expected = model.whole.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **model.inputs(sizes),
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
    rows_left = [len(set((kept[2][0] // 4).tolist())), len(set((kept[1][0] // 3).tolist()))]
    assert rows_left[0] < 11, "rows of the tall picture are empty"
    assert rows_left[1] < 5
    found = answer(model, visual, encoded(model))
    cases = zip(found, encoded(model), PROMPTS, kept, strict=True)
    for logits, prompt, (_, sizes), indices in cases:
        assert_same(logits, definition(model, prompt, sizes, indices))
        assert len(set(logits.argmax(-1).tolist())) > 2  # a model that repeats one word would prove nothing


@pytest.mark.parametrize("ends", ["no break", "no end", "a break of every row"])
def test_other_ends_of_rows_give_other_answers(model, ends):
    kept, visual = pruned(model, SHARES)
    found, image = answer(model, visual, encoded(model)), model.checkpoint.image_token

    def other(size: tuple[int, int], indices: Tensor, span: Span) -> Span:
        rows, columns = model.checkpoint.geometry.grid(size)
        if ends != "a break of every row":
            dropped = model.id("[IMG_BREAK]" if ends == "no break" else "[IMG_END]")
            return line_span(span.tokens[span.tokens != dropped])
        each = np.bincount(indices.numpy() // columns, minlength=rows)
        tokens = [token for count in each for token in [*[image] * count, model.id("[IMG_BREAK]")]]
        return line_span(np.array([*tokens[:-1], model.id("[IMG_END]")]))

    changed = [
        [(rows, other(size, index, span)) for (rows, span), size, index in zip(pictures, sizes, indices, strict=True)]
        for pictures, (_, sizes), indices in zip(visual, PROMPTS, kept, strict=True)
    ]
    far = (answer(model, changed, encoded(model)) - found)[:, 0].abs().amax(dim=-1)
    moved = torch.tensor([sum(len(span) for _, span in pictures) for pictures in changed]) != torch.tensor(
        [sum(len(span) for _, span in pictures) for pictures in visual]
    )
    assert moved.sum() >= 2
    assert (far[moved] > 100 * NEAR).all(), far
