"""The two halves of a model whose pictures are cut into tiles, and the whole of it, to be compared.

What is left of pruned pictures is compared with what pruning means: the whole prompt, whose pruned tokens nobody can
see and which take no positions, computed by transformers' whole model, anew for each word and without a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from otprune.models import Checkpoint, Decoder, Encoder, Prompt, load_decoder, load_encoder, read_checkpoint
from pipelines.images.frames import render
from pipelines.images.resize import Raster

CPU = {"dtype": torch.float32, "device": "cpu"}
NEW_TOKENS = 8
NEAR = 1e-4  # float32 on a CPU, where the order of sums differs

Size = tuple[int, int]


@dataclass
class Model:
    """The halves, the whole, and transformers' own image processor, without and with its normalisation."""

    checkpoint: Checkpoint
    encoder: Encoder
    decoder: Decoder
    whole: Any
    processor: Any

    def frame(self, size: Size) -> Tensor:
        """The crops of a picture as a job cuts them, uint8 [crops, tile, tile, 3]."""
        frame = self.checkpoint.geometry.frame(size)
        raster = Raster(picture(size), size[1], size[0])
        return torch.from_numpy(render(raster, frame, self.checkpoint.geometry.background))

    def rows(self, sizes: Sequence[Size]) -> list[Tensor]:
        """The tokens of each picture, seen in one call."""
        regions = self.encoder.regions([self.frame(size) for size in sizes], sizes, "joint")
        return [region.features for (region,) in regions]

    def inputs(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        """What transformers' processor makes of pictures for the whole model."""
        return dict(self.processor([picture(size) for size in sizes], return_tensors="pt"))

    def expected_rows(self, sizes: Sequence[Size]) -> list[Tensor]:
        """The tokens of each picture by the whole model."""
        inputs = self.inputs(sizes)
        with torch.inference_mode():
            features = self.whole.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        return list(features.pooler_output)

    def ids(self, prompt: Prompt, sizes: Sequence[Size]) -> Tensor:
        """Ids [1, L] of a whole prompt, with an image token for each token of the whole model."""
        ids = list(prompt[0])
        for rows, text in zip(self.expected_rows(sizes), prompt[1:], strict=True):
            ids += [self.checkpoint.image_token] * len(rows) + text
        return torch.tensor([ids])


def load(folder: Path, processor: Any) -> Model:
    """`processor` is the class of transformers' image processor that works with Pillow."""
    checkpoint = read_checkpoint(str(folder))
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    decoder = load_decoder(checkpoint, **CPU)
    decoder.end_tokens = []  # every answer has NEW_TOKENS tokens
    return Model(checkpoint, load_encoder(checkpoint, **CPU), decoder, whole, processor.from_pretrained(folder))


def picture(size: Size) -> Image.Image:
    height, width = size
    coarse = np.random.default_rng(height + width).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def some(count: int, share: float) -> Tensor:
    """A random ascending subset of `count` tokens."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[: max(1, round(share * count))].sort().values


def answer(model: Model, visual: Sequence[Sequence[Tensor]], prompts: list[Prompt]) -> Tensor:
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
    expected = model.whole.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **model.inputs(sizes),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(expected.logits)
    assert logits.argmax(-1).tolist() == expected.sequences[0, ids.shape[1] :].tolist()
    return logits


@torch.inference_mode()
def definition(model: Model, prompt: Prompt, sizes: Sequence[Size], kept: Sequence[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt in which only `kept` of each picture's tokens are there."""
    inner, ids, features = model.whole.model, model.ids(prompt, sizes), model.expected_rows(sizes)
    is_image = ids[0] == model.checkpoint.image_token
    seen = [torch.zeros(len(rows), dtype=torch.bool) for rows in features]
    for mask, index in zip(seen, kept, strict=True):
        mask[index] = True
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    visible[is_image] = torch.cat(seen)
    embeds = inner.get_input_embeddings()(ids)
    embeds[0, is_image] = torch.cat(features)
    logits = []
    for _ in range(NEW_TOKENS):
        length = embeds.shape[1]
        can_see = (torch.ones(length, length).tril().bool() & visible) | torch.eye(length, dtype=torch.bool)
        hidden = inner.language_model(
            inputs_embeds=embeds,
            attention_mask=can_see[None, None],
            position_ids=(visible.cumsum(0) - 1)[None],  # of hidden tokens: whatever they are
            use_cache=False,
        ).last_hidden_state
        logits.append(model.whole.lm_head(hidden[0, -1]))
        word = inner.get_input_embeddings()(logits[-1].argmax().view(1, 1))
        embeds, visible = torch.cat([embeds, word], dim=1), torch.cat([visible, visible.new_ones(1)])
    return torch.stack(logits)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same words, and the same log-probabilities but for rounding."""
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=NEAR, rtol=0)


def assert_answers(
    model: Model, prompts: Sequence[tuple[str, list[Size]]], share: float, *, varied: bool = True
) -> None:
    """A ragged batch of (text, sizes of its pictures) is answered as by the definition; all kept: as by `generate`.

    Args:
        varied: answers must not repeat one word, which would prove little.
    """
    encoded = [model.decoder.encode_prompt(text, num_images=len(sizes)) for text, sizes in prompts]
    rows = [model.rows(sizes) for _, sizes in prompts]
    kept = [[some(len(tokens), share) for tokens in pictures] for pictures in rows]
    visual = [
        [tokens[index] for tokens, index in zip(pictures, indices, strict=True)]
        for pictures, indices in zip(rows, kept, strict=True)
    ]
    assert len({sum(map(len, pictures)) for pictures in visual}) == len(prompts), "the batch is to be ragged"
    found = answer(model, visual, encoded)
    for logits, prompt, (_, sizes), indices in zip(found, encoded, prompts, kept, strict=True):
        expected = own_answer(model, prompt, sizes) if share == 1 else definition(model, prompt, sizes, indices)
        assert_same(logits, expected)
        assert not varied or len(set(logits.argmax(-1).tolist())) > 2
