"""Checkpoints of Qwen2.5-VL, Qwen3-VL and Qwen3.5 as they are published: names, flat configurations, prompts, ends."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from otprune.families import Options
from otprune.models import load_decoder, load_encoder, load_prompter, read_checkpoint
from tests.otprune.families.loading import CPU, assert_same_answer, rename, rows_and_answer, stored_names
from tests.tiny import MAKERS

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]


def make(name: str, folder: Path, **options) -> Path:
    return MAKERS[name](folder / name, **options)


# Names


def test_transformers_saves_under_the_published_names(tmp_path):
    roots = {
        name: {re.sub(r"(\.\d+)?\.[^.]*$", "", n) for n in stored_names(make(name, tmp_path))} for name in FAMILIES
    }
    assert {"visual.blocks.0.attn.qkv", "visual.merger.mlp", "model.layers.0.self_attn.q_proj"} <= roots["qwen2_5_vl"]
    for name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5"):
        assert {"model.visual.blocks.0.attn.qkv", "model.language_model.layers.1.self_attn.q_proj"} <= roots[name]
    assert "model.language_model.layers.0.mlp.experts" in roots["qwen3_vl_moe"]


def test_qwen2_5_vl_loads_from_the_layout_of_later_versions_too(tmp_path):
    folder = make("qwen2_5_vl", tmp_path)
    expected = rows_and_answer(folder)
    rename(folder, lambda name: re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name)))
    assert {"model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"} <= stored_names(folder)
    assert_same_answer(folder, expected)


def test_a_flat_configuration_as_qwen2_5_vl_publishes_it_is_read(tmp_path):
    """The language model's sizes stand beside the tower's, the old names of M-RoPE and of the channels among them."""
    folder = make("qwen2_5_vl", tmp_path)
    expected = rows_and_answer(folder)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    for key in ("model_type", "dtype", "layer_types", "rope_parameters"):
        text.pop(key, None)
    flat = {**text, **config, "rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    flat["vision_config"] = {k: v for k, v in vision.items() if k in TOWER} | {"in_chans": 3, "spatial_patch_size": 14}
    (folder / "config.json").write_text(json.dumps(flat))
    assert read_checkpoint(str(folder)).language.hidden == 64
    assert_same_answer(folder, expected)


TOWER = {
    "depth",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "spatial_merge_size",
    "window_size",
    "fullatt_block_indexes",
    "tokens_per_second",
    "temporal_patch_size",
}
"""The keys of the tower in the published configuration, beside in_chans and spatial_patch_size."""


# Halves


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_of_another_limit_need_no_other_encoder(name, tmp_path):
    folder = make(name, tmp_path)
    small = read_checkpoint(str(folder), Options(max_pixels=9 * 1024))
    frame = small.geometry.frame((600, 600))
    assert frame.height * frame.width <= 9 * 1024
    [[region]] = load_encoder(small, **CPU).regions(
        [torch.zeros(frame.shape, dtype=torch.uint8)], [(600, 600)], "joint"
    )
    assert len(region.features) == small.geometry.num_visual((600, 600)) == 9


# Prompts and answers of Qwen3.5


def test_a_model_that_can_think_is_told_not_to(tmp_path):
    prompter = load_prompter(make("qwen3_5", tmp_path))
    assert prompter.tokenizer.decode(prompter.encode_prompt("describe")[-1]).endswith(
        "describe<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_the_end_of_a_turn_ends_an_answer_where_the_configuration_names_that_of_a_document_alone(tmp_path):
    folder = make("qwen3_5", tmp_path)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    assert load_prompter(folder).end_tokens == [9, 2]
    assert load_decoder(folder, **CPU).end_tokens == [9, 2]


def test_weights_of_a_head_that_drafts_tokens_are_left_alone(tmp_path):
    """The released files hold some (`mtp.*`)."""
    folder = make("qwen3_5", tmp_path)
    expected = rows_and_answer(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.ones(64, 128)}, file, {"format": "pt"})
    assert_same_answer(folder, expected)
    assert expected[1]
