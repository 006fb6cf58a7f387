"""The multiply-adds of Qwen2.5-VL, Qwen3-VL and Qwen3.5, from a picture's size, against what the models multiply."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from otprune import num_kept
from otprune.flops import decode_flops, prefill_flops, projector_flops, true_flops, vision_flops
from otprune.models import load_decoder, load_encoder, read_checkpoint
from otprune.shapes import LinearShape, PatchVisionShape
from tests.tiny import MAKERS

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
CPU = {"dtype": torch.float32, "device": "cpu"}
# Windows of 2 x 2 tokens: whole ones alone, a row and a column of halves, and pictures smaller than a window.
SIZES = [(112, 224), (150, 260), (310, 130), (60, 60), (30, 500)]  # height, width


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return read_checkpoint(str(MAKERS[request.param](tmp_path_factory.mktemp(request.param))))


@pytest.mark.parametrize("size", SIZES)
def test_tower_and_mergers_are_counted_as_they_multiply(checkpoint, size):
    encoder = load_encoder(checkpoint, **CPU)
    frame = checkpoint.geometry.frame(size)
    # The counter does not know the CPU's fused attention, but its matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder.regions([torch.zeros(frame.shape, dtype=torch.uint8)], [size], "joint")
    sides = (frame.height, frame.width)
    found = vision_flops(checkpoint.vision, frame=sides) + projector_flops(checkpoint.shape, frame=sides)
    assert counter.get_total_flops() == 2 * found


@pytest.mark.slow
@pytest.mark.parametrize("length", [7, 70])
def test_the_language_model_is_counted_as_it_multiplies(checkpoint, length):
    model = load_decoder(checkpoint, **CPU).model
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        positions = torch.arange(length).expand(3, 1, length)
        model(inputs_embeds=torch.randn(1, length, 64), position_ids=positions, logits_to_keep=1)
    # The rotary embedding of Qwen's models multiplies no matrices, and attention runs over the full square.
    unseen = 0
    if (linear := checkpoint.language.linear) is not None:
        # The counter does not know triangular systems, and counts the rows that a convolution computes beyond the last.
        systems = -(-length // 64) * linear.value_heads * 64 * 63 // 2 * (linear.key_dim + linear.value_dim)
        unseen = len(linear.layers) * (systems - (linear.kernel - 1) * convolution(linear))
    assert counter.get_total_flops() == 2 * (prefill_flops(checkpoint.language, length) - unseen)


def convolution(linear: LinearShape) -> int:
    """Multiply-adds of one row."""
    return linear.kernel * (2 * linear.key_heads * linear.key_dim + linear.value_heads * linear.value_dim)


def test_a_step_of_decoding_is_counted_as_it_multiplies(checkpoint):
    model, length = load_decoder(checkpoint, **CPU).model, 9
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"

    def run(num_rows: int, at: int, **inputs):
        positions = torch.arange(at, at + num_rows).expand(3, 1, num_rows)
        return model(inputs_embeds=torch.randn(1, num_rows, 64), position_ids=positions, use_cache=True, **inputs)

    with torch.inference_mode():
        cache = run(length, 0).past_key_values
        with FlopCounterMode(display=False) as counter:
            run(1, length, past_key_values=cache)
    unseen = 0
    if (linear := checkpoint.language.linear) is not None:
        # The delta rule of a single row multiplies element by element; the convolution computes the row before it too.
        rule = 3 * linear.value_heads * linear.key_dim * linear.value_dim
        unseen = len(linear.layers) * (rule - convolution(linear))
    assert counter.get_total_flops() == 2 * (decode_flops(checkpoint.language, length, 2) - unseen)


def test_true_flops_follow_from_the_picture(checkpoint):
    frame = checkpoint.geometry.frame((150, 260))
    sides, num_visual = (frame.height, frame.width), checkpoint.geometry.num_visual((150, 260))
    whole = true_flops(checkpoint.shape, "none", num_text=20, frame=sides)
    pruned = true_flops(checkpoint.shape, "otprune", num_text=20, frame=sides, retention=0.3)
    assert whole.vision == pruned.vision == vision_flops(checkpoint.vision, frame=sides)
    assert whole.projector == pruned.projector == projector_flops(checkpoint.shape, frame=sides)
    assert whole.prefill == prefill_flops(checkpoint.language, 20 + num_visual)
    assert pruned.prefill == prefill_flops(checkpoint.language, 20 + num_kept(0.3, num_visual))


def test_a_picture_sent_smaller_costs_less_in_the_tower_too(checkpoint):
    smaller = checkpoint.geometry.shrunk(0.25).frame((600, 800))
    whole = checkpoint.geometry.frame((600, 800))
    costs = [vision_flops(checkpoint.vision, frame=(frame.height, frame.width)) for frame in (smaller, whole)]
    assert 0.03 < costs[0] / costs[1] < 0.25  # linear parts a quarter or less, attention a sixteenth


def test_a_tower_of_any_size_needs_a_frame(checkpoint):
    with pytest.raises(ValueError, match="needs the frame of the picture, got none"):
        vision_flops(checkpoint.vision)
    with pytest.raises(ValueError, match="needs the frame of the picture, got none"):
        true_flops(checkpoint.shape, "none", num_text=20)


def test_windows_end_at_the_layers_that_see_the_whole_picture(tmp_path):
    config = AutoConfig.from_pretrained(MAKERS["qwen2_5_vl"](tmp_path)).vision_config
    shape = PatchVisionShape.from_config(config)
    assert (shape.window, shape.window_layers, shape.layers, shape.ffn_matrices) == (2, 2, 3, 3)
    # One window holds the whole picture of 2 x 2 tokens, so windows change nothing; four do not.
    without = PatchVisionShape(**{**vars(shape), "window": 0, "window_layers": 0})
    assert vision_flops(shape, frame=(56, 56)) == vision_flops(without, frame=(56, 56))
    saved = vision_flops(without, frame=(112, 112)) - vision_flops(shape, frame=(112, 112))
    assert saved == 2 * 2 * 32 * (64**2 - 4 * 16**2)  # layers, 2 d, pairs of patches
