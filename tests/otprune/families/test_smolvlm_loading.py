"""Checkpoints of SmolVLM2 and Idefics3 as they are published: names, and what is refused."""

import json
import re

import pytest
from safetensors.torch import load_file

from otprune.models import read_checkpoint
from tests.otprune.families.loading import assert_same_answer, change_json, refused, rename, rows_and_answer
from tests.tiny import MAKERS, make_smolvlm

# Names and halves


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_names_with_and_without_the_prefix_of_the_whole_model_load(tmp_path, name):
    folder = MAKERS[name](tmp_path)
    stored = set(load_file(folder / "model.safetensors"))
    assert {re.sub(r"^model\.(\w+)\..*", r"\1", each) for each in stored} == {
        *("vision_model", "connector", "text_model", "lm_head.weight")
    }
    expected = rows_and_answer(folder)
    rename(folder, lambda each: re.sub(r"^model\.", "", each))
    assert_same_answer(folder, expected)


# What is refused


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("config.json", {"text_config": {"model_type": "mistral"}}, "must be llama, got 'mistral'"),
        ("config.json", {"top": {"scale_factor": 3}}, "scale_factor must divide the 8 patches of a row .*, got 3"),
        ("config.json", {"vision_config": {"image_size": 112}}, "max_image_size must be the tower's 112, got 58"),
        ("preprocessor_config.json", {"top": {"size": {"height": 58, "width": 58}}}, "size must name a longest_edge"),
        ("preprocessor_config.json", {"top": {"size": {"longest_edge": 175}}}, "must be even, .*, got 58 and 175"),
        ("preprocessor_config.json", {"top": {"size": {"longest_edge": 8000}}}, "58 to 4096 pixels, got 58 and 8000"),
        ("preprocessor_config.json", {"top": {"size": {"longest_edge": 40}}}, "58 to 4096 pixels, got 58 and 40"),
        ("preprocessor_config.json", {"top": {"do_image_splitting": False}}, "do_image_splitting must be true, got f"),
        ("preprocessor_config.json", {"top": {"do_resize": False}}, "do_resize must be true, got false"),
    ],
)
def test_checkpoints_that_have_not_been_tried_are_refused_in_one_line(tmp_path, name, sections, message):
    folder = make_smolvlm(tmp_path)
    change_json(folder / name, **sections)
    refused(folder, message)


def test_without_a_tokenizer_there_are_no_labels(tmp_path):
    folder = make_smolvlm(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "must hold the tokenizer of a SmolVLM: ")


def test_statistics_of_a_processor_that_stores_none_are_siglips(tmp_path):
    folder = make_smolvlm(tmp_path)
    file = folder / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stored.items() if not key.startswith("image_")}))
    assert read_checkpoint(str(folder)).mean == (0.5, 0.5, 0.5)
