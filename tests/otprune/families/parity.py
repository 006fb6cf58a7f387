"""The two halves of a model against the whole of it, which is transformers': the same tokens, the same answers.

What is left of pruned pictures is compared with the definition of pruning: the whole prompt, whose pruned tokens nobody
can see, computed by the whole model, anew for each word and without a cache. Hidden tokens take no positions, but with
M-RoPE, where every token stays at the position of its place. Layers with linear attention see what a mask hides, so for
their models the pruned tokens are taken out, and the others keep their positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from otprune.families import Span
from otprune.models import Checkpoint, Decoder, Encoder, Kept, Prompt, load_decoder, load_encoder, read_checkpoint
from pipelines.images.frames import render
from pipelines.images.resize import Raster

CPU = {"dtype": torch.float32, "device": "cpu"}
NEW_TOKENS = 8
NEAR = 1e-4  # float32 on a CPU, where the order of sums differs

Size = tuple[int, int]
Case = tuple[str, list[Size]]
"""A text and the sizes of the pictures that it is about."""
Visual = list[list[tuple[Tensor, Span]]]
"""Of each prompt the rows and the span of each of its pictures."""


@dataclass
class Model:
    """The halves, the whole, and what transformers makes of pictures for the whole."""

    checkpoint: Checkpoint
    encoder: Encoder
    decoder: Decoder
    whole: Any
    inputs: Callable[[Sequence[Size]], dict[str, Tensor]]
    """(sizes of pictures) -> the whole model's inputs by transformers' image processor."""
    written: Callable[["Model", Sequence[Size]], list[list[int]]]
    """(model, sizes of pictures) -> the ids that stand for each of them in a whole prompt of transformers."""

    def frame(self, size: Size) -> Tensor:
        """The pixels of a picture as a job makes them, uint8."""
        return frame(self.checkpoint, size)

    def rows(self, sizes: Sequence[Size]) -> list[Tensor]:
        """What the language model gets of all tokens of each picture, seen in one call."""
        regions = self.encoder.regions([self.frame(size) for size in sizes], sizes, "joint")
        return [region.features if region.rows is None else region.rows for (region,) in regions]

    def features(self, sizes: Sequence[Size]) -> Any:
        """The output of the whole model's tower."""
        with torch.inference_mode():
            return self.whole.model.get_image_features(**self.inputs(sizes), return_dict=True)

    def span(self, size: Size, kept: Tensor) -> Span:
        return self.checkpoint.geometry.span(size, kept.numpy(), self.checkpoint.image_token)

    def ids(self, prompt: Prompt, sizes: Sequence[Size]) -> Tensor:
        """Ids [1, L] of a whole prompt, with the pictures as transformers writes them."""
        ids = list(prompt[0])
        for picture_ids, text in zip(self.written(self, sizes), prompt[1:], strict=True):
            ids += picture_ids + text
        return torch.tensor([ids])

    def prompts(self, cases: Sequence[Case]) -> list[Prompt]:
        return [self.decoder.encode_prompt(text, num_images=len(sizes)) for text, sizes in cases]


def load(
    folder: Path,
    inputs: Callable[[Sequence[Size]], dict[str, Tensor]],
    written: Callable[[Model, Sequence[Size]], list[list[int]]],
) -> Model:
    checkpoint = read_checkpoint(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    decoder = load_decoder(checkpoint, **CPU)
    decoder.end_tokens = []  # every answer has NEW_TOKENS tokens
    return Model(checkpoint, load_encoder(checkpoint, **CPU), decoder, whole, inputs, written)


def tokens_of_each_picture(model: Model, sizes: Sequence[Size]) -> list[list[int]]:
    """`Model.written` of a model that writes nothing but image tokens, where its tower gives those of each picture."""
    return [[model.checkpoint.image_token] * len(rows) for rows in model.features(sizes).pooler_output]


def picture(size: Size) -> Image.Image:
    height, width = size
    coarse = np.random.default_rng(height + width).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def frame(checkpoint: Checkpoint, size: Size) -> Tensor:
    raster = Raster(picture(size), size[1], size[0])
    return torch.from_numpy(render(raster, checkpoint.geometry.frame(size), checkpoint.geometry.background))


def normalized(model: Model, pixels: Tensor) -> Tensor:
    """Pixels as the tower's image processor would hand them over, by the definition."""
    mean, std = torch.tensor(model.checkpoint.mean), torch.tensor(model.checkpoint.std)
    return ((pixels.float() / 255 - mean) / std).movedim(-1, -3)


# What is kept


def some(count: int, share: float) -> Tensor:
    """A random ascending subset of `count` tokens."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[: max(1, round(share * count))].sort().values


def pruned(model: Model, cases: Sequence[Case], shares: Sequence[float]) -> tuple[list[list[Tensor]], Visual]:
    """(indices, rows and spans) of a random part of each picture of each case."""
    kept, visual = [], []
    for share, (_, sizes) in zip(shares, cases, strict=True):
        kept.append([some(model.checkpoint.geometry.num_visual(size), share) for size in sizes])
        pictures = zip(model.rows(sizes), sizes, kept[-1], strict=True)
        visual.append([(rows[index], model.span(size, index)) for rows, size, index in pictures])
    return kept, visual


# Answers


def answer(model: Model, visual: Visual, prompts: list[Prompt]) -> Tensor:
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


def own_answer(model: Model, prompt: Prompt, sizes: Sequence[Size]) -> Tensor:
    """Logits [NEW_TOKENS, V] of transformers' own `generate` on the whole pictures."""
    ids = model.ids(prompt, sizes)
    is_image = (ids == model.checkpoint.image_token).int()
    expected = model.whole.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **({"mm_token_type_ids": is_image} if model.checkpoint.geometry.axes == 3 else {}),
        **model.inputs(sizes),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(expected.logits)
    assert logits.argmax(-1).tolist() == expected.sequences[0, ids.shape[1] :].tolist()
    return logits


def visible_tokens(model: Model, ids: list[int], kept: list[Tensor], sizes: Sequence[Size]) -> Tensor:
    """bool [L]: which of a whole prompt's ids can be seen: all text, and of each picture the `kept` tokens."""
    seen = [torch.zeros(model.checkpoint.geometry.num_visual(size), dtype=torch.bool) for size in sizes]
    for mask, index in zip(seen, kept, strict=True):
        mask[index] = True
    visible = torch.ones(len(ids), dtype=torch.bool)
    visible[torch.tensor(ids) == model.checkpoint.image_token] = torch.cat(seen)
    return visible


@torch.inference_mode()
def definition(
    model: Model, prompt: Prompt, sizes: Sequence[Size], kept: list[Tensor], visible_of: Callable[..., Tensor]
) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt, of which only `visible_of(model, ids, kept, sizes)` can be seen."""
    inner, ids, output = model.whole.model, model.ids(prompt, sizes), model.features(sizes)
    is_image = ids[0] == model.checkpoint.image_token
    visible = visible_of(model, ids[0].tolist(), kept, sizes)
    language = inner.text_model if hasattr(inner, "text_model") else inner.language_model
    embeds = inner.get_input_embeddings()(ids)
    embeds[0, is_image] = flat(output.pooler_output)
    if model.checkpoint.geometry.axes == 3:
        grid = model.inputs(sizes)["image_grid_thw"]
        positions, _ = inner.get_rope_index(ids, mm_token_type_ids=is_image[None].int(), image_grid_thw=grid)
    else:
        positions = (visible.cumsum(0) - 1).clamp(min=0)[None]  # of hidden tokens: whatever they are
    levels = [flat(level) for level in output.deepstack_features] if model.checkpoint.levels else []
    logits = []
    for _ in range(NEW_TOKENS):
        length = embeds.shape[1]
        can_see = (torch.ones(length, length).tril().bool() & visible) | torch.eye(length, dtype=torch.bool)
        deep = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": levels} if levels else {}
        hidden = language(
            inputs_embeds=embeds, position_ids=positions, attention_mask=can_see[None, None], use_cache=False, **deep
        ).last_hidden_state
        logits.append(model.whole.lm_head(hidden[0, -1]))
        word = inner.get_input_embeddings()(logits[-1].argmax().view(1, 1))
        embeds = torch.cat([embeds, word], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        visible, is_image = torch.cat([visible, visible.new_ones(1)]), torch.cat([is_image, is_image.new_zeros(1)])
    return torch.stack(logits)


@torch.inference_mode()
def taken_out(
    model: Model, prompt: Prompt, sizes: Sequence[Size], kept: list[Tensor], visible_of: Callable[..., Tensor]
) -> Tensor:
    """As `definition`, of the prompt without what cannot be seen, at the positions of the whole prompt."""
    inner, ids = model.whole.model, model.ids(prompt, sizes)
    is_image, grid = ids[0] == model.checkpoint.image_token, model.inputs(sizes)["image_grid_thw"]
    positions, _ = inner.get_rope_index(ids, mm_token_type_ids=is_image[None].int(), image_grid_thw=grid)
    embeds = inner.get_input_embeddings()(ids)
    embeds[0, is_image] = flat(model.features(sizes).pooler_output)
    stays = visible_of(model, ids[0].tolist(), kept, sizes)
    embeds, positions, logits = embeds[:, stays], positions[..., stays], []
    for _ in range(NEW_TOKENS):
        logits.append(model.whole(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0, -1])
        word = inner.get_input_embeddings()(logits[-1].argmax().view(1, 1))
        embeds, positions = torch.cat([embeds, word], 1), torch.cat([positions, positions[..., -1:] + 1], 2)
    return torch.stack(logits)


def flat(parts: Sequence[Tensor]) -> Tensor:
    """[tokens, D] from the tokens of pictures or of their crops, one behind the other."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


# What must hold


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same words, and the same log-probabilities but for rounding."""
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=NEAR, rtol=0)


def assert_whole_answers(model: Model, cases: Sequence[Case], *, varied: bool = True) -> None:
    """A batch that keeps all tokens is answered as by transformers' own `generate`.

    Args:
        varied: answers must not repeat one word, which would prove little.
    """
    _, visual = pruned(model, cases, [1.0] * len(cases))
    found = answer(model, visual, model.prompts(cases))
    for logits, prompt, (_, sizes) in zip(found, model.prompts(cases), cases, strict=True):
        assert_same(logits, own_answer(model, prompt, sizes))
        assert not varied or len(set(logits.argmax(-1).tolist())) > 2


def assert_pruned_answers(
    model: Model,
    cases: Sequence[Case],
    kept: list[list[Tensor]],
    visual: Visual,
    *,
    visible_of: Callable[..., Tensor] = visible_tokens,
) -> None:
    """A ragged batch of pruned pictures is answered as by the definition."""
    assert len({sum(len(span) for _, span in pictures) for pictures in visual}) == len(cases), "the batch is ragged"
    found = answer(model, visual, model.prompts(cases))
    for logits, expected in zip(found, definitions(model, cases, kept, visible_of), strict=True):
        assert_same(logits, expected)
        assert len(set(logits.argmax(-1).tolist())) > 2  # a model that repeats one word would prove nothing


def definitions(
    model: Model,
    cases: Sequence[Case],
    kept: list[list[Tensor]],
    visible_of: Callable[..., Tensor] = visible_tokens,
) -> list[Tensor]:
    """What pruning means for each case."""
    each = zip(model.prompts(cases), cases, kept, strict=True)
    by_family = definition if model.checkpoint.language.linear is None else taken_out
    return [by_family(model, prompt, sizes, indices, visible_of) for prompt, (_, sizes), indices in each]


def assert_tokens(model: Model, sizes: Sequence[Size], counts: Sequence[int]) -> None:
    """Pictures seen in one call have the whole model's tokens, as many as `counts` says, and the same when alone."""
    found, expected = model.rows(sizes), flat(model.features(sizes).pooler_output).split(list(counts))
    assert [model.checkpoint.geometry.num_visual(size) for size in sizes] == list(counts)
    assert model.encoder.row_width == model.checkpoint.row_width
    for size, tokens, whole in zip(sizes, found, expected, strict=True):
        assert tokens.shape == (len(whole), model.checkpoint.row_width)
        torch.testing.assert_close(tokens[:, : whole.shape[1]], whole, atol=NEAR, rtol=0)
        torch.testing.assert_close(tokens, *model.rows([size]), atol=NEAR, rtol=0)


def assert_half_of_each_region_joins(model: Model, sizes: Sequence[Size], way: Any, num_regions: Sequence[int]) -> None:
    """Half of each region is dropped; what is left has the whole model's order and says where it came from."""
    regions = model.encoder.regions([model.frame(size) for size in sizes], sizes, way)
    assert [len(each) for each in regions] == list(num_regions)
    for size, whole, parts in zip(sizes, model.rows(sizes), regions, strict=True):
        halves = [torch.arange(0, len(region.features), 2) for region in parts]
        kept = [Kept(part.features[half], half, len(part.features)) for part, half in zip(parts, halves, strict=True)]
        joined = model.encoder.join(size, kept, way)
        assert joined.source.tolist() == list(range(0, model.checkpoint.geometry.num_visual(size), 2))
        assert joined.num_visual == model.checkpoint.geometry.num_visual(size)
        torch.testing.assert_close(joined.tokens, whole[joined.source], atol=0, rtol=0)
