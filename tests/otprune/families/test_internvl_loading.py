"""Checkpoints of InternVL as they are published: names, decoders, and what is refused."""

import json

import pytest

from otprune.models import load_decoder, read_checkpoint
from tests.otprune.families.loading import (
    CPU,
    change_json,
    refused,
)
from tests.tiny import make_internvl


@pytest.mark.parametrize("decoder", ["qwen3", "llama"])
def test_a_tied_head_of_the_other_decoders_is_the_embedding(decoder, tmp_path):
    folder = make_internvl(tmp_path, decoder=decoder, tie=True)
    model = load_decoder(read_checkpoint(str(folder)), **CPU).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.std() > 0.5


# What is refused


def test_the_format_with_code_of_its_own_is_refused_with_the_name_of_the_other(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    refused(tmp_path, r"internvl_chat.* -hf or -HF, as OpenGVLab/InternVL3-8B-hf")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"top": {"vision_feature_layer": -2}}, "must be -1 and 'default', got -2 and 'default'"),
        ({"top": {"vision_feature_select_strategy": "full"}}, "must be -1 and 'default', got -1 and 'full'"),
        ({"top": {"downsample_ratio": 0.3}}, "tokens fill, got image_size .*56, 56.* and downsample_ratio 0.3"),
        ({"vision_config": {"image_size": [56, 112]}}, r"square pictures .*, got image_size \[56, 112\]"),
        ({"vision_config": {"image_size": [112, 112]}}, "image processor's size must be the tower's 112 x 112"),
        ({"text_config": {"model_type": "qwen3_moe"}}, "must be one of llama, qwen2, qwen3, got 'qwen3_moe'"),
    ],
)
def test_checkpoints_that_have_not_been_tried_are_refused_in_one_line(tmp_path, sections, message):
    folder = make_internvl(tmp_path)
    change_json(folder / "config.json", **sections)
    refused(folder, message)
