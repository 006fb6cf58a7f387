"""The two halves of SmolVLM2 and Idefics3 against the whole of them: the same tokens, the same answers.

What is left of pruned pictures is compared with the definition of pruning: the whole prompt, labels included, whose
pruned tokens nobody can see, with the visible ones counted as positions, computed anew for each word without a cache.
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
from transformers import AutoModelForImageTextToText, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from otprune.families import Options, Span
from otprune.models import Checkpoint, Decoder, Encoder, Kept, Prompt, load_decoder, load_encoder, read_checkpoint
from pipelines.images.frames import render
from pipelines.images.resize import Raster
from tests.tiny import MAKERS

CPU = {"dtype": torch.float32, "device": "cpu"}
NEW_TOKENS = 8
NEAR = 1e-4  # float32 on a CPU, where the order of sums differs
LANDSCAPE, PORTRAIT, SQUARE = (150, 260), (310, 90), (60, 60)  # height, width: 2 x 3 tiles, 3 x 1 and 3 x 3
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SQUARE]), ("compare the two", [PORTRAIT, SQUARE]))
SHARES = (0.5, 0.3, 0.06)  # of the last, some tiles keep nothing
IMAGES = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}


@dataclass
class Model:
    """The two halves, the whole, and transformers' processors of pictures and of text."""

    checkpoint: Checkpoint
    encoder: Encoder
    decoder: Decoder
    whole: Any
    images: Any
    processor: Any

    def pixels(self, sizes: Sequence[tuple[int, int]], **keys: Any) -> Tensor:
        """[1, crops of all pictures, 3, side, side], as the processor of a prompt with these pictures has them."""
        return self.images([[picture(size) for size in sizes]], return_tensors="pt", **keys)["pixel_values"]

    def rows(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        regions = self.encoder.regions([self.frame(size) for size in sizes], sizes, "joint")
        return [region.features for (region,) in regions]

    def frame(self, size: tuple[int, int]) -> Tensor:
        return frame(self.checkpoint, size)

    def span(self, size: tuple[int, int], kept: Tensor) -> Span:
        return self.checkpoint.geometry.span(size, kept.numpy(), self.checkpoint.image_token)

    def ids(self, text: str, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Ids [1, L] that transformers' processor makes of a message with these pictures."""
        parts = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": text}]
        rendered = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = self.processor(text=rendered, images=[[picture(size) for size in sizes]], return_tensors="pt")
        return inputs["input_ids"]


def frame(checkpoint: Checkpoint, size: tuple[int, int]) -> Tensor:
    raster = Raster(picture(size), size[1], size[0])
    return torch.from_numpy(render(raster, checkpoint.geometry.frame(size), checkpoint.geometry.background))


def picture(size: tuple[int, int]) -> Image.Image:
    height, width = size
    coarse = np.random.default_rng(height + width).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def model(request, tmp_path_factory) -> Model:
    folder = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    checkpoint = read_checkpoint(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    decoder = load_decoder(checkpoint, **CPU)
    decoder.end_tokens = []  # every answer has NEW_TOKENS tokens
    images = IMAGES[request.param].from_pretrained(folder)
    # SmolVLM's own processor needs num2words, which is no dependency here. It writes the same for pictures (see below).
    template: Any = decoder.tokenizer.chat_template
    processor = Idefics3Processor(images, decoder.tokenizer, 16, chat_template=template)
    return Model(checkpoint, load_encoder(checkpoint, **CPU), decoder, whole, images, processor)


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
def definition(model: Model, text: str, sizes: Sequence[tuple[int, int]], kept: list[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt in which only `kept` of each picture's tokens, and text, are seen."""
    inner, ids = model.whole.model, model.ids(text, sizes)
    features = torch.cat(inner.get_image_features(model.pixels(sizes), return_dict=True).pooler_output)
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
        hidden = inner.text_model(
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


@pytest.mark.parametrize("tiles", [9, 4, 1])
@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (31, 700), (20, 20), (58, 58), (997, 640), (1, 58)])
def test_crops_are_those_of_the_image_processor(model, size, tiles):
    """Pixel for pixel: a picture scaled to the longest edge, stretched to whole tiles, and squeezed into the overview.

    Of square numbers of tiles the limit is the processor's with a shorter edge.
    """
    checkpoint = read_checkpoint(str(model.checkpoint.path), Options(max_tiles=tiles))
    found = frame(checkpoint, size)
    crops = found.reshape(-1, *found.shape[-3:])
    edge = next(edge for edge in (174, 116, 58) if num_tiles(model, size, edge) <= tiles)
    pixels = ((crops.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    torch.testing.assert_close(pixels, model.pixels([size], size={"longest_edge": edge})[0], atol=1e-5, rtol=0)


def num_tiles(model: Model, size: tuple[int, int], edge: int) -> int:
    crops = model.pixels([size], size={"longest_edge": edge}).shape[1]
    return max(1, crops - 1)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    sizes = [LANDSCAPE, PORTRAIT, SQUARE]
    with torch.inference_mode():
        output = model.whole.model.get_image_features(model.pixels(sizes), return_dict=True)
    counts = [model.checkpoint.geometry.num_visual(size) for size in sizes]
    assert counts == [112, 64, 160]
    found = model.rows(sizes)
    for tokens, whole in zip(found, torch.cat(output.pooler_output).split(counts), strict=True):
        torch.testing.assert_close(tokens, whole, atol=NEAR, rtol=0)
        assert tokens.shape[1] == model.checkpoint.row_width == model.encoder.row_width
    torch.testing.assert_close(found[1], *model.rows([PORTRAIT]), atol=NEAR, rtol=0)


@pytest.mark.parametrize("way", ["joint", "tiles", "grid"])
def test_each_way_has_all_tokens_in_the_order_of_the_whole_model(model, way):
    """Half of each region is dropped; what is left says where it came from."""
    sizes = [LANDSCAPE, PORTRAIT]
    regions = model.encoder.regions([model.frame(size) for size in sizes], sizes, way)
    assert [len(each) for each in regions] == ([1, 1] if way == "joint" else [7, 4])
    for size, whole, parts in zip(sizes, model.rows(sizes), regions, strict=True):
        kept = []
        for region in parts:
            source = torch.arange(0, len(region.features), 2)
            kept.append(Kept(region.features[source], source, len(region.features)))
        joined = model.encoder.join(size, kept, way)
        assert joined.source.tolist() == list(range(0, model.checkpoint.geometry.num_visual(size), 2))
        torch.testing.assert_close(joined.tokens, whole[joined.source], atol=0, rtol=0)


# Prompts


def whole_ids(model: Model, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> list[int]:
    ids = list(prompt[0])
    for size, text in zip(sizes, prompt[1:], strict=True):
        everything = torch.arange(model.checkpoint.geometry.num_visual(size))
        ids += [*model.span(size, everything).tokens.tolist(), *text]
    return ids


@pytest.mark.parametrize("sizes", [[LANDSCAPE], [PORTRAIT], [SQUARE, LANDSCAPE], [(31, 700)]])
def test_a_prompt_with_whole_spans_is_the_one_that_transformers_processor_makes(model, sizes):
    prompt = model.decoder.encode_prompt("what?", num_images=len(sizes))
    assert whole_ids(model, prompt, sizes) == model.ids("what?", sizes)[0].tolist()


@pytest.mark.parametrize("tiles", [9, 1])
def test_a_span_is_what_both_processors_write_for_a_picture(model, tiles):
    checkpoint = read_checkpoint(str(model.checkpoint.path), Options(max_tiles=tiles))
    geometry: Any = checkpoint.geometry
    tokenizer = model.decoder.tokenizer
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "image_seq_len": 16}
    processor: Any = SimpleNamespace(**names, global_image_tag="<global-img>")
    for size in (LANDSCAPE, PORTRAIT, SQUARE):
        rows, columns = geometry.tiles(size) if tiles > 1 else (0, 0)
        inputs = {"rows": [[rows]], "cols": [[columns]]}
        written = Idefics3Processor.replace_image_token(processor, inputs, 0)
        names = ("<fake_token_around_image>", "<image>", "<global-img>")
        assert written == get_image_prompt_string(rows, columns, 16, *names)
        span = geometry.span(size, np.arange(geometry.num_visual(size)), checkpoint.image_token)
        assert span.tokens.tolist() == tokenizer(written).input_ids


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    _, visual = pruned(model, (1.0, 1.0, 1.0))
    found = answer(model, visual, encoded(model))
    for i, (text, sizes) in enumerate(PROMPTS):
        ids = model.ids(text, sizes)
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
    lengths = [sum(len(span) for _, span in pictures) for pictures in visual]
    assert len(set(lengths)) == len(PROMPTS)  # the batch is ragged
    assert {0, 1, 2, 3} - set((kept[2][0] // 16).tolist())  # a tile without tokens
    found = answer(model, visual, encoded(model))
    for logits, (text, sizes), indices in zip(found, PROMPTS, kept, strict=True):
        assert_same(logits, definition(model, text, sizes, indices))
        assert len(set(logits.argmax(-1).tolist())) > 2  # a model that repeats one word would prove nothing


def test_the_same_tokens_in_another_order_or_under_other_labels_give_other_answers(model):
    kept, visual = pruned(model, SHARES)
    found = answer(model, visual, encoded(model))
    moved = [[(rows.roll(1, 0), span) for rows, span in pictures] for pictures in visual]
    far = (answer(model, moved, encoded(model)) - found)[:, 0].abs().amax(dim=-1)
    assert (far > 100 * NEAR).all(), far
    first = [
        [
            (rows, model.span(size, torch.arange(len(index))))
            for (rows, _), size, index in zip(each, sizes, indices, strict=True)
        ]
        for each, (_, sizes), indices in zip(visual, PROMPTS, kept, strict=True)
    ]
    far = (answer(model, first, encoded(model)) - found)[:, 0].abs().amax(dim=-1)
    assert (far > 100 * NEAR).all(), far
