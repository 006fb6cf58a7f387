"""Checkpoints of Mistral-Small-3: names, tokens, multiply-adds, and what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from otprune.flops import prefill_flops
from otprune.models import load_decoder, read_checkpoint
from tests.otprune.families.loading import (
    CPU,
    change_json,
    refused,
)
from tests.tiny import make_mistral3

# The ids of the ends of rows


def test_the_ids_of_the_ends_of_rows_are_the_tokenizers(tmp_path):
    folder = make_mistral3(tmp_path)
    tokenizer, geometry = AutoTokenizer.from_pretrained(folder), read_checkpoint(str(folder)).geometry
    row_break, end = tokenizer.convert_tokens_to_ids(["[IMG_BREAK]", "[IMG_END]"])
    assert (geometry.row_break, geometry.end) == (row_break, end)
    assert len({row_break, end, tokenizer.convert_tokens_to_ids("[IMG]"), tokenizer.unk_token_id}) == 4


def test_a_tokenizer_without_ends_of_rows_is_refused_in_one_line(tmp_path):
    folder = make_mistral3(tmp_path)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("[IMG_BREAK]", "[OTHER]"))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("[IMG_BREAK]", "[OTHER]"))
    refused(folder, r"tokens \[IMG_BREAK\], \[IMG_END\], found none for \[IMG_BREAK\]$")
    file.write_text("[1]")
    refused(folder, "must hold the tokenizer of a Mistral-Small-3: ")
    file.unlink()
    (folder / "tekken.json").write_text("{}")  # of a library of Mistral's own
    refused(folder, "tokenizer of a Mistral-Small-3: found no tokenizer.json$")


# Multiply-adds


def test_the_language_model_is_counted_as_it_multiplies(tmp_path):
    checkpoint = read_checkpoint(str(make_mistral3(tmp_path)))
    model = load_decoder(checkpoint, **CPU).model
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(inputs_embeds=torch.randn(1, 31, 64), logits_to_keep=1)
    assert counter.get_total_flops() == 2 * prefill_flops(checkpoint.language, 31)


# What is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"top": {"vision_feature_layer": -2}}, "vision_feature_layer must be -1, the tower's last, got -2"),
        ({"top": {"vision_feature_layer": [-2, -1]}}, r"vision_feature_layer must be -1, .*, got \[-2, -1\]"),
        ({"vision_config": {"patch_size": [7, 14]}}, r"vision_config.patch_size must be one number, got \[7, 14\]"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "must be pixtral, got 'siglip_vision_model'"),
        ({"text_config": {"model_type": "ministral3"}}, "text_config.model_type must be mistral, got 'ministral3'"),
    ],
)
def test_checkpoints_that_have_not_been_tried_are_refused_in_one_line(tmp_path, sections, message):
    folder = make_mistral3(tmp_path)
    change_json(folder / "config.json", **sections)
    refused(folder, message)


@pytest.mark.parametrize("size", [{"height": 150, "width": 150}, {"longest_edge": 0}])
def test_another_kind_of_size_is_refused_in_one_line(tmp_path, size):
    folder = make_mistral3(tmp_path)
    file = folder / "preprocessor_config.json"
    change_json(file, top={"size": size})
    refused(folder, "size must hold a longest_edge of at least 1 pixel, got")
    file.unlink()
    assert read_checkpoint(str(folder)).geometry.longest == 1024, "as transformers' image processor has it"
