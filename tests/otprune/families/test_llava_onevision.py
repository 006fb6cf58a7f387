"""LLaVA-OneVision: counts and pixels as transformers' processor has them, tokens and answers as its model has them."""

import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from otprune import num_kept
from otprune.anyres import pack_tiles
from otprune.families import Options
from otprune.families.llava_next import Tiled, scaled_down
from otprune.families.llava_onevision import LLAVA_ONEVISION
from otprune.flops import prefill_flops, projector_flops, true_flops, vision_flops
from otprune.methods import get_method
from otprune.methods.m3 import m3_pool
from otprune.models import Kept, load_decoder, load_encoder, read_checkpoint
from otprune.models.checkpoint import CheckpointError
from tests.otprune.families import parity
from tests.otprune.families.loading import copied
from tests.otprune.families.parity import CPU, NEAR, Model, picture
from tests.otprune.families.test_llava_geometry import sizes
from tests.tiny import make_llava_onevision
from tests.tiny_llava import released_name

RELEASED = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
TILED = Tiled(side=384, grid_side=27, resolutions=RELEASED, background=(127, 127, 127), most_tiles=9)
# Height, width: grids of tokens that are scaled down, with bars on either axis or none; and others: whole tiles, a part
# of them, one tile, smaller than a tile, thin.
SCALED, NOT_SCALED = (
    [(150, 170), (170, 145), (200, 200), (150, 260), (310, 130)],
    [(88, 88), (60, 50), (44, 44), (20, 30), (3, 120)],
)
PICTURES = [*SCALED, *NOT_SCALED]
PROMPTS = [("describe the picture", [SCALED[0]]), ("what?", [(310, 130)]), ("compare the two", [(60, 50), (44, 44)])]
HALVES = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_llava_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(folder)


def load(folder: Path) -> Model:
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder)

    def inputs(sizes):
        found = processor([picture(size) for size in sizes], return_tensors="pt")
        return {key: found[key] for key in ("pixel_values", "image_sizes")}

    return parity.load(folder, inputs, parity.tokens_of_each_picture)


# Geometry


def test_the_number_of_tokens_is_that_of_transformers():
    processor = object.__new__(LlavaOnevisionProcessor)  # counting needs no tokenizer
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(size) for size in RELEASED])
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    usual = [size for size in sizes(400) if min(size) * 384 >= max(size)]
    assert len(usual) > 200
    for size in usual:
        assert TILED.num_visual(size) == processor._get_number_of_features(*size, 384, 384), size
    frames = [TILED.frame(size) for size in usual]
    many = [frame.rows * frame.columns for frame in frames]
    assert min(many) == 1
    assert max(many) > 16


def test_tokens_of_usual_photographs():
    counts = [TILED.num_visual(size) for size in [(384, 384), (480, 640), (768, 1024), (1080, 1920), (3000, 4000)]]
    assert counts == [729 + 27 * 28, 2929, 4725, 7269, 7309]
    assert [TILED.frame(size).num_crops for size in [(384, 384), (768, 1024), (3000, 4000)]] == [2, 7, 31]


def test_no_picture_has_more_tokens_than_the_largest():
    """Nearly the bound's: a picture of the most tokens is just not scaled down."""
    grid = [(height, width) for height in range(300, 3000, 37) for width in range(300, 3000, 31)]
    most = max(map(TILED.num_visual, grid))
    assert 0.99 * TILED.most_visual < most <= TILED.most_visual == 729 + 7938 + 162
    assert max(np.prod(TILED.frame(size).shape) for size in grid) == TILED.most_bytes == 37 * 3 * 384**2


@pytest.mark.parametrize(("grid", "expected"), [((81, 81), (81, 81)), ((81, 98), (81, 98)), ((81, 99), (73, 89))])
def test_a_grid_of_many_more_tokens_than_nine_tiles_is_scaled_to_about_as_many(grid: tuple[int, int], expected):
    """At 1.1 squared times as many, which 81 x 98 are and 81 x 99 exceed."""
    assert scaled_down(*grid, 9 * 729) == expected
    assert math.prod(expected) <= 1.21 * 6561
    assert scaled_down(*grid, 0) == grid


# Pixels and tokens


@pytest.mark.parametrize("size", PICTURES)
def test_crops_are_those_of_transformers_pixel_for_pixel(model, size):
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(model.checkpoint.path)
    expected = processor([picture(size)], do_rescale=False, do_normalize=False, return_tensors="pt")
    (crops,) = expected["pixel_values"]
    torch.testing.assert_close(model.frame(size).permute(0, 3, 1, 2), crops.to(torch.uint8), atol=0, rtol=0)
    assert model.checkpoint.mean == model.checkpoint.std == (0.5, 0.5, 0.5)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    geometry = model.checkpoint.geometry
    parity.assert_tokens(model, PICTURES, [len(tokens) for tokens in model.features(PICTURES).pooler_output])
    unscaled = replace(geometry, most_tiles=0)
    assert [size for size in PICTURES if geometry.num_visual(size) < unscaled.num_visual(size)] == SCALED


def test_without_scaling_down_large_pictures_have_other_tokens(model):
    crops = torch.randn(17, 9, 8)
    newline = torch.ones(8)
    scaled = pack_tiles(crops, grid=(4, 4), image_size=(100, 100), newline_D=newline, most_tiles=4)
    whole = pack_tiles(crops, grid=(4, 4), image_size=(100, 100), newline_D=newline)
    assert (len(scaled), len(whole)) == (9 + 6 * 7, 9 + 12 * 13)
    # Half the size, bilinearly: each token is the mean of 2 x 2.
    halves = whole[9:].reshape(12, 13, 8)[:, :12].reshape(6, 2, 6, 2, 8).mean(dim=(1, 3))
    torch.testing.assert_close(scaled[9:].reshape(6, 7, 8)[:, :6], halves)
    torch.testing.assert_close(scaled[9:].reshape(6, 7, 8)[:, 6], newline.expand(6, 8))


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    parity.assert_whole_answers(model, PROMPTS)


def test_half_of_the_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    parity.assert_pruned_answers(model, PROMPTS, *parity.pruned(model, PROMPTS, HALVES))


def test_the_prompt_is_that_of_the_released_template(model):
    before, after = model.decoder.encode_prompt("What is it?")
    decode = model.decoder.tokenizer.decode
    assert decode(before) == "<|im_start|>user "
    assert decode(after) == "\nWhat is it?<|im_end|><|im_start|>assistant\n"


# Ways


def test_tiles_are_chosen_from_by_themselves_and_are_not_scaled_down(model):
    size = SCALED[0]
    (crops,) = model.encoder.regions([model.frame(size)], [size], "tiles")
    assert [len(region.features) for region in crops] == [9] * 17
    assert model.checkpoint.geometry.num_visual(size, "tiles") == 9 * 17
    parts = [Kept(region.features[i % 9, None], torch.tensor([i % 9]), 9) for i, region in enumerate(crops)]
    kept = model.encoder.join(size, parts, "tiles")
    assert kept.source.tolist() == [9 * i + i % 9 for i in range(17)]
    assert kept.num_visual == 9 * 17


@pytest.mark.parametrize("side", [1, 3])
def test_squares_are_pooled_in_each_tile_and_then_scaled_down_by_the_same_ratio(model, side):
    size = SCALED[2]
    (crops,) = model.encoder.regions([model.frame(size)], [size], "grid")
    pooled = [m3_pool(region.features[None], side)[0] for region in crops]
    kept = model.encoder.join(size, [Kept(tokens, torch.zeros(side**2), 9) for tokens in pooled], "grid")
    expected = pack_tiles(
        torch.stack(pooled), grid=(4, 4), image_size=size, newline_D=model.encoder.newline, most_tiles=4
    )
    assert len(kept.tokens) == {1: 1 + 2 * 3, 3: 9 + 6 * 7}[side]
    torch.testing.assert_close(kept.tokens, expected)
    if side == 3:  # nothing was pooled
        torch.testing.assert_close(kept.tokens, *model.rows([size]), atol=NEAR, rtol=0)
        assert kept.source.tolist() == list(range(51))


# Checkpoints


def test_released_names_of_weights_load_as_those_that_transformers_5_saves(model, folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    ours = {name: weight.contiguous() for name, weight in model.whole.state_dict().items()}
    assert "model.image_newline" in ours
    released = {released_name(name): weight for name, weight in ours.items()}
    assert {"image_newline", "language_model.lm_head.weight", "multi_modal_projector.linear_1.bias"} < set(released)
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in released
    size = SCALED[0]
    for number, weights in enumerate((stored, ours, released)):
        other = tmp_path / str(number)
        other.mkdir()
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (other / file.name).write_bytes(file.read_bytes())
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        (((region,),), expected) = (
            load_encoder(other, **CPU).regions([model.frame(size)], [size], "joint"),
            model.rows([size])[0],
        )
        torch.testing.assert_close(region.features, expected, atol=0, rtol=0)
        head = load_decoder(other, **CPU).model.lm_head.weight
        torch.testing.assert_close(head, model.decoder.model.lm_head.weight, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "of_config",
    [
        {"tie": True},  # the 0.5B's
        {"vision_feature_layer": -2},
        {"vision_feature_layer": [1, -1]},
        {"multimodal_projector_bias": False},
        {"vision_aspect_ratio": "anyres_max_12"},
    ],
)
def test_checkpoints_of_other_settings_answer_as_transformers(of_config, tmp_path):
    model = load(make_llava_onevision(tmp_path, **of_config))
    parity.assert_whole_answers(model, PROMPTS[:2], varied="tie" not in of_config)  # a tied head repeats the last word


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio must be anyres_max_ and a number of tiles, got 'squ"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio must be anyres_max_ and a number of tiles"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy must be 'full', so that"),
        ({"image_grid_pinpoints": [[44, 60]]}, "must be sizes in whole tiles of 44 x 44 pixels, got [(44, 60)]"),
        ({"image_grid_pinpoints": []}, "must be sizes in whole tiles of 44 x 44 pixels, got []"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(keys, says, folder, tmp_path):
    with pytest.raises(
        CheckpointError, match=f"must describe a model of LLaVA-OneVision: .*{re.escape(says)}"
    ) as caught:
        read_checkpoint(str(copied(folder, tmp_path, **keys)))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_the_newline_token_is_refused(folder, tmp_path):
    other = copied(folder, tmp_path)
    weights = {name: w for name, w in load_file(folder / "model.safetensors").items() if "newline" not in name}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="must hold the weight image_newline, found none in"):
        load_encoder(other, **CPU)


def test_pictures_of_free_size_are_refused(folder):
    with pytest.raises(CheckpointError, match=r"model\.max_pixels and model\.min_pixels must be null"):
        read_checkpoint(str(folder), Options(max_pixels=10000))


def test_the_image_token_may_have_its_newer_name(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    token = config.pop("image_token_index", None) or config.pop("image_token_id")
    copied(folder, tmp_path)
    for name in ("image_token_id", "image_token_index"):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: token}))
        assert read_checkpoint(str(tmp_path)).image_token == token == 5


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("prumerge", None, "prumerge reads the attention of a class token"),
        ("fastv", None, "fastv takes images of one size alone, so it cannot prune LLaVA-OneVision"),
        ("cdpruner", {"relevance": "clip"}, "needs a CLIP tower"),
        ("cdpruner", {"relevance": "words"}, None),
        ("otprune", None, None),
        ("m3", None, None),
    ],
)
def test_methods_that_do_not_fit_are_refused_in_one_line(method, settings, says, folder):
    reason = LLAVA_ONEVISION.refuses(get_method(method), read_checkpoint(str(folder)), settings)
    assert (reason is None) if says is None else says in reason


def test_the_checkpoint_travels_with_its_geometry(folder):
    found = read_checkpoint(str(folder))
    assert pickle.loads(pickle.dumps(found)) == found
    geometry = found.geometry
    assert (geometry.axes, geometry.fixed, geometry.tiled, geometry.shrunk(0.5)) == (1, None, True, None)
    assert geometry.background == (127, 127, 127)
    assert (found.row_width, found.levels, found.class_attention) == (64, 0, False)


# FLOPs


@pytest.mark.parametrize("size", [SCALED[0], (310, 130), (44, 44)])
def test_tower_and_projector_are_counted_as_they_multiply(model, size):
    """Scaling down multiplies no matrices."""
    frame = model.checkpoint.geometry.frame(size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encoder.regions([model.frame(size)], [size], "joint")
    shape, crops = model.checkpoint.shape, frame.num_crops
    assert counter.get_total_flops() == 2 * (
        vision_flops(shape.vision, crops=crops) + projector_flops(shape, crops=crops)
    )


def test_true_flops_follow_from_the_pictures_size(model):
    geometry, shape, size = model.checkpoint.geometry, model.checkpoint.shape, SCALED[0]
    num_visual, crops = geometry.num_visual(size), geometry.frame(size).num_crops
    given = {"num_text": 20, "num_visual": num_visual, "crops": crops}
    whole = true_flops(shape, "none", **given)
    pruned = true_flops(shape, "otprune", **given, retention=0.3)
    assert whole.vision == pruned.vision == vision_flops(shape.vision, crops=crops)
    assert whole.prefill == prefill_flops(shape.language, 20 + num_visual)
    assert pruned.prefill == prefill_flops(shape.language, 20 + num_kept(0.3, num_visual))
