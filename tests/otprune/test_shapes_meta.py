"""LLaVA-1.5-13B and LLaVA-1.6-7B at full size on the meta device: no weights, but every shape.

Configurations are those of the released checkpoints (llava-hf), written out here because nothing is downloaded.
"""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from otprune import num_kept
from otprune.flops import prefill_flops, projector_flops, true_flops, vision_flops
from otprune.shapes import MODELS, LanguageShape, VisionShape

VICUNA = {  # parameters with Vicuna's own vocabulary of 32,000; sizes
    "7b": (6738415616, {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}),
    "13b": (13015864320, {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}),
}
CLIP_LARGE_336 = 303_507_456
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # height, width
PADDED_VOCABULARY = 32064


@functools.lru_cache
def built(name: str):
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    _, sizes = VICUNA[name.rpartition("-")[2]]
    heads = sizes["hidden_size"] // 128
    text = LlamaConfig(**sizes, num_attention_heads=heads, vocab_size=PADDED_VOCABULARY, max_position_embeddings=4096)
    with torch.device("meta"):
        if name.startswith("llava-1.6"):
            config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS)
            return LlavaNextForConditionalGeneration(config).eval()
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "llava-1.6-7b"])
def test_parameters_are_those_of_the_published_parts(name):
    vicuna, sizes = VICUNA[name.rpartition("-")[2]]
    width = sizes["hidden_size"]
    padding = 2 * (PADDED_VOCABULARY - 32000) * width  # embeddings and head
    projector = 1024 * width + width + width * width + width
    newline = width if name.startswith("llava-1.6") else 0
    total = sum(parameter.numel() for parameter in built(name).parameters())
    assert total == vicuna + padding + CLIP_LARGE_336 + projector + newline
    assert {"llava-1.5-7b": "7.06", "llava-1.5-13b": "13.35", "llava-1.6-7b": "7.06"}[name] == f"{total / 1e9:.2f}"


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "llava-1.6-7b"])
def test_named_shapes_are_those_of_the_configurations(name):
    config = built(name).config
    assert MODELS[name].language == LanguageShape.from_config(config.text_config)
    assert MODELS[name].vision == VisionShape.from_config(config.vision_config)


def test_the_13b_model_has_576_tokens_of_width_5120_and_keeps_56():
    model = built("llava-1.5-13b")
    pixels = torch.empty(2, 3, 336, 336, device="meta")
    features = torch.stack(list(model.get_image_features(pixels).pooler_output))
    assert features.shape == (2, 576, 5120)
    assert num_kept(0.098, features.shape[1]) == 56


@pytest.mark.slow
@pytest.mark.parametrize("kept", [576, 56])
def test_the_13b_prefill_is_counted_as_the_model_multiplies(kept):
    model, num_text = built("llava-1.5-13b"), 40
    embeddings = torch.empty(1, num_text + kept, 5120, device="meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.language_model(inputs_embeds=embeddings)
        model.lm_head(torch.empty(1, 1, 5120, device="meta"))
    shape = MODELS["llava-1.5-13b"].language
    assert counter.get_total_flops() == 2 * prefill_flops(shape, num_text + kept)


def anyres_tokens(height: int, width: int) -> int:
    """576 of the overview, and a row of tokens and a newline for each row of the grid that the image covers."""

    def fit(rows: int, columns: int) -> tuple[int, int]:
        scale = min(columns / width, rows / height)
        covered = min(int(width * scale) * int(height * scale), width * height)
        return covered, covered - rows * columns

    rows, columns = max(PINPOINTS, key=lambda pinpoint: fit(*pinpoint))
    rows, columns = rows // 14, columns // 14
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return 576 + rows * (columns + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(672, 672), (480, 640), (640, 480), (333, 500), (1000, 300), (100, 100)])
def test_any_res_images_have_the_tokens_of_the_definition(height, width):
    model = built("llava-1.6-7b")
    with torch.no_grad():
        crops = torch.empty(1, 5, 3, 336, 336, device="meta")
        found = model.get_image_features(crops, image_sizes=[[height, width]], vision_feature_layer=-2)
    [features] = found.pooler_output
    assert features.shape == (anyres_tokens(height, width), 4096)


def test_the_largest_any_res_image_is_2928_tokens_of_which_2880_are_patches():
    assert anyres_tokens(672, 672) == 2928 == 5 * 576 + 48
    assert (
        max(anyres_tokens(height, width) for height in range(200, 1400, 60) for width in range(200, 1400, 60)) == 2928
    )
    assert num_kept(0.098, 2928) == 287


def test_true_flops_of_any_res_count_five_crops_and_all_their_tokens():
    shape = MODELS["llava-1.6-7b"]
    whole = true_flops(shape, "none", num_text=40, num_visual=2928, crops=5)
    pruned = true_flops(shape, "otprune", num_text=40, num_visual=2928, crops=5, retention=0.098)
    assert whole.vision == pruned.vision == 5 * vision_flops(shape.vision)
    assert whole.projector == 5 * projector_flops(shape)
    assert whole.prefill == prefill_flops(shape.language, 40 + 2928)
    assert pruned.prefill == prefill_flops(shape.language, 40 + 287)
