"""The two halves of Qwen2.5-VL, Qwen3-VL and Qwen3.5 against the whole of them: the same tokens, the same answers.

What is left of pruned pictures is compared with the definition of pruning: the whole prompt, whose pruned tokens nobody
can see, with every token at its own position, computed anew for each word without a cache. Layers with linear attention
see what a mask hides, so for Qwen3.5 the pruned tokens are taken out, and the others keep their positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from otprune.families import Span
from otprune.models import Checkpoint, Decoder, Encoder, Prompt, load_decoder, load_encoder, read_checkpoint
from otprune.models.decoding import decode
from tests.tiny import MAKERS

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
CPU = {"dtype": torch.float32, "device": "cpu"}
NEW_TOKENS = 8
NEAR = 1e-4  # float32 on a CPU, where the order of sums differs
LANDSCAPE, PORTRAIT, SQUARE = (150, 260), (310, 130), (200, 200)  # height, width
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [PORTRAIT]), ("compare the two", [PORTRAIT, SQUARE]))
SHARES = (0.5, 0.3, 0.6)


@dataclass
class Model:
    """The two halves, the whole, and what transformers' image processor makes of pictures."""

    checkpoint: Checkpoint
    encoder: Encoder
    decoder: Decoder
    whole: Any
    processor: Any

    def pixels(self, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        return dict(self.processor([picture(size) for size in sizes], return_tensors="pt"))

    def rows(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        regions = self.encoder.regions([self.frame(size) for size in sizes], sizes, "joint")
        return [region.features if region.rows is None else region.rows for (region,) in regions]

    def frame(self, size: tuple[int, int]) -> Tensor:
        frame = self.checkpoint.geometry.frame(size)
        resized = picture(size).resize((frame.width, frame.height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized))

    def prompt(self, text: str, num_images: int) -> Prompt:
        return self.decoder.encode_prompt(text, num_images=num_images)

    def span(self, size: tuple[int, int], kept: Tensor) -> Span:
        return self.checkpoint.geometry.span(size, kept.numpy(), self.checkpoint.image_token)

    def ids(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Ids [1, L] of a whole prompt, with as many image tokens as transformers expects."""
        counts = self.pixels(sizes)["image_grid_thw"].prod(dim=1) // 4
        ids = list(prompt[0])
        for count, text in zip(counts.tolist(), prompt[1:], strict=True):
            ids += [self.checkpoint.image_token] * count + text
        return torch.tensor([ids])


def picture(size: tuple[int, int]) -> Image.Image:
    height, width = size
    coarse = np.random.default_rng(height + width).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Model:
    folder = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    checkpoint = read_checkpoint(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    decoder = load_decoder(checkpoint, **CPU)
    decoder.end_tokens = []  # every answer has NEW_TOKENS tokens
    return Model(
        checkpoint, load_encoder(checkpoint, **CPU), decoder, whole, AutoImageProcessor.from_pretrained(folder)
    )


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


def kept_of(model: Model, share: float, size: tuple[int, int], seed: int = 0) -> Tensor:
    """A random ascending subset of a picture's tokens."""
    count = model.checkpoint.geometry.num_visual(size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(share * count))].sort().values


def pruned(model: Model, shares: Sequence[float]) -> tuple[list[list[Tensor]], list[list[tuple[Tensor, Span]]]]:
    """(indices, rows and spans) of what each prompt keeps of its pictures."""
    kept = [[kept_of(model, share, size) for size in sizes] for share, (_, sizes) in zip(shares, PROMPTS, strict=True)]
    visual = [
        [
            (rows[index], model.span(size, index))
            for rows, size, index in zip(model.rows(sizes), sizes, indices, strict=True)
        ]
        for indices, (_, sizes) in zip(kept, PROMPTS, strict=True)
    ]
    return kept, visual


def encoded(model: Model) -> list[Prompt]:
    return [model.prompt(text, len(sizes)) for text, sizes in PROMPTS]


@torch.inference_mode()
def definition(model: Model, prompt: Prompt, sizes: Sequence[tuple[int, int]], kept: list[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt in which only `kept` of each picture's tokens can be seen."""
    inner, ids = model.whole.model, model.ids(prompt, sizes)
    pixels = model.pixels(sizes)
    grid = pixels["image_grid_thw"]
    is_image = ids[0] == model.checkpoint.image_token
    positions, _ = inner.get_rope_index(ids, mm_token_type_ids=is_image[None].int(), image_grid_thw=grid)
    features = inner.get_image_features(pixels["pixel_values"], grid, return_dict=True)
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    seen = [torch.zeros(len(rows), dtype=torch.bool) for rows in features.pooler_output]
    for mask, index in zip(seen, kept, strict=True):
        mask[index] = True
    visible[is_image] = torch.cat(seen)
    logits = []
    for _ in range(NEW_TOKENS):
        length = ids.shape[1]
        can_see = (torch.ones(length, length).tril().bool() & visible) | torch.eye(length, dtype=torch.bool)
        embeds = inner.get_input_embeddings()(ids)
        embeds[0, is_image] = torch.cat(list(features.pooler_output))
        deep = {}
        if model.checkpoint.levels:
            levels = [torch.cat(list(level)) for level in features.deepstack_features]
            deep = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": levels}
        hidden = inner.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=can_see[None, None], use_cache=False, **deep
        ).last_hidden_state
        logits.append(model.whole.lm_head(hidden[0, -1]))
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=2)
        visible = torch.cat([visible, visible.new_ones(1)])
        is_image = torch.cat([is_image, is_image.new_zeros(1)])  # even if the word is the image token
    return torch.stack(logits)


@torch.inference_mode()
def taken_out(model: Model, prompt: Prompt, sizes: Sequence[tuple[int, int]], kept: list[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of transformers' whole model on the prompt without the tokens that are not `kept`.

    Every other token has the position that transformers gives it in the whole prompt.
    """
    inner, ids, pixels = model.whole.model, model.ids(prompt, sizes), model.pixels(sizes)
    grid = pixels["image_grid_thw"]
    is_image = ids[0] == model.checkpoint.image_token
    positions, _ = inner.get_rope_index(ids, mm_token_type_ids=is_image[None].int(), image_grid_thw=grid)
    features = inner.get_image_features(pixels["pixel_values"], grid, return_dict=True).pooler_output
    embeds = inner.get_input_embeddings()(ids)
    embeds[0, is_image] = torch.cat(list(features))
    starts = np.cumsum([0, *(len(rows) for rows in features)])
    stays = ~is_image
    stays[is_image.nonzero()[torch.cat([index + start for index, start in zip(kept, starts, strict=False)]), 0]] = True
    embeds, positions, logits = embeds[:, stays], positions[..., stays], []
    for _ in range(NEW_TOKENS):
        logits.append(model.whole(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0, -1])
        word = inner.get_input_embeddings()(logits[-1].argmax().view(1, 1))
        embeds, positions = torch.cat([embeds, word], 1), torch.cat([positions, positions[..., -1:] + 1], 2)
    return torch.stack(logits)


def definitions(model: Model, kept: list[list[Tensor]]) -> list[Tensor]:
    """What pruning means for each of PROMPTS."""
    by_family = definition if model.checkpoint.language.linear is None else taken_out
    cases = zip(encoded(model), PROMPTS, kept, strict=True)
    return [by_family(model, prompt, sizes, indices) for prompt, (_, sizes), indices in cases]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=NEAR, rtol=0)


def assert_different(model: Model, found: Tensor, kept: list[list[Tensor]]) -> None:
    """Every first word has other probabilities than by the definition, far beyond rounding; some words are others."""
    expected = torch.stack(definitions(model, kept))
    far = (found[:, 0].log_softmax(-1) - expected[:, 0].log_softmax(-1)).abs().amax(dim=-1)
    assert (far > 1000 * NEAR).all(), far
    assert found.argmax(-1).tolist() != expected.argmax(-1).tolist()


# The tower


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (31, 700), (20, 20)])
def test_patches_are_those_of_the_image_processor(model, size):
    expected = model.pixels([size])
    frame = model.frame(size)
    found = model.encoder.patchify(frame)
    assert expected["image_grid_thw"].tolist() == [
        [1, frame.shape[0] // model.encoder.patch, frame.shape[1] // model.encoder.patch]
    ]
    torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=0)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    sizes = [LANDSCAPE, PORTRAIT, SQUARE]
    pixels = model.pixels(sizes)
    with torch.inference_mode():
        expected = model.whole.model.get_image_features(
            pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True
        )
    found = [region for (region,) in model.encoder.regions([model.frame(size) for size in sizes], sizes, "joint")]
    for i, region in enumerate(found):
        torch.testing.assert_close(region.features, expected.pooler_output[i], atol=NEAR, rtol=0)
        assert len(region.features) == model.checkpoint.geometry.num_visual(sizes[i])
        rows = region.features if region.rows is None else region.rows
        assert rows.shape[1] == model.checkpoint.row_width == model.encoder.row_width
        if model.checkpoint.levels:
            levels = [level[i] for level in expected.deepstack_features]
            torch.testing.assert_close(rows, torch.cat([expected.pooler_output[i], *levels], 1), atol=NEAR, rtol=0)


def test_a_picture_has_the_same_tokens_alone_as_among_others(model):
    together = model.rows([LANDSCAPE, PORTRAIT])
    torch.testing.assert_close(together[1], *model.rows([PORTRAIT]), atol=NEAR, rtol=0)


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    _, visual = pruned(model, (1.0, 1.0, 1.0))
    found = answer(model, visual, encoded(model))
    for i, (prompt, (_, sizes)) in enumerate(zip(encoded(model), PROMPTS, strict=True)):
        ids = model.ids(prompt, sizes)
        is_image = (ids == model.checkpoint.image_token).int()
        expected = model.whole.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=is_image,
            **model.pixels(sizes),
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
    for logits, expected in zip(found, definitions(model, kept), strict=True):
        assert_same(logits, expected)
        assert len(set(logits.argmax(-1).tolist())) > 2  # a model that repeats one word would prove nothing


def test_positions_one_behind_the_other_give_other_answers(model):
    kept, visual = pruned(model, SHARES)
    compact = [
        [(rows, Span(span.tokens, np.tile(np.arange(len(span)), (3, 1)), len(span))) for rows, span in pictures]
        for pictures in visual
    ]
    assert_different(model, answer(model, compact, encoded(model)), kept)


def test_text_that_follows_the_kept_tokens_at_once_gives_other_answers(model):
    kept, visual = pruned(model, SHARES)
    moved = [
        [(rows, Span(span.tokens, span.positions, int(span.positions.max()) + 3)) for rows, span in pictures]
        for pictures in visual
    ]
    assert_different(model, answer(model, moved, encoded(model)), kept)


def test_without_deep_stack_the_answers_are_others(model):
    if not model.checkpoint.levels:
        pytest.skip("the family has no DeepStack")
    kept, visual = pruned(model, SHARES)
    width = model.checkpoint.language.hidden
    for pictures in visual:
        for rows, _ in pictures:
            rows[:, width:] = 0
    assert_different(model, answer(model, visual, encoded(model)), kept)


def test_linear_attention_sees_what_a_mask_hides(model):
    """So the reference of the other families is none here, and the test above would fail with it."""
    if model.checkpoint.language.linear is None:
        pytest.skip("every layer attends to every token")
    kept, visual = pruned(model, SHARES)
    first, (_, sizes) = encoded(model)[0], PROMPTS[0]
    hidden = definition(model, first, sizes, kept[0])
    far = (answer(model, visual, encoded(model))[0, 0].log_softmax(-1) - hidden[0].log_softmax(-1)).abs().max()
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


def test_finished_answers_leave_a_batch_of_three_axes(model):
    """The answers do not change when a word of some of them ends these, and the others go on in a smaller batch."""
    _, visual = pruned(model, SHARES)
    words = answer(model, visual, encoded(model)).argmax(-1).tolist()
    last = next(word for row in words for word in row if not all(word in other for other in words))
    model.decoder.end_tokens = [last]
    try:
        found = model.decoder.generate(visual, encoded(model), max_new_tokens=NEW_TOKENS)
    finally:
        model.decoder.end_tokens = []
    for completion, row in zip(found, words, strict=True):
        until = row.index(last) if last in row else NEW_TOKENS
        assert completion.num_generated_tokens == min(until + 1, NEW_TOKENS)
        assert completion.text == model.decoder.tokenizer.decode(row[:until], skip_special_tokens=True).strip()
    assert {completion.finish_reason for completion in found} == {"stop", "length"}
