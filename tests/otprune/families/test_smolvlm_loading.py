"""Checkpoints of SmolVLM2 and Idefics3 as they are published: names, halves, multiply-adds, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from otprune import num_kept
from otprune.flops import prefill_flops, projector_flops, true_flops, vision_flops
from otprune.methods import METHODS
from otprune.models import CheckpointError, load_decoder, load_encoder, read_checkpoint
from tests.tiny import MAKERS, make_smolvlm

CPU = {"dtype": torch.float32, "device": "cpu"}
SIZE = (150, 260)  # 2 x 3 tiles and the overview


def rename(folder: Path, change) -> None:
    """Stores the weights under the names that `change` gives; None leaves a weight out."""
    file = folder / "model.safetensors"
    renamed = {change(name): tensor for name, tensor in load_file(file).items()}
    renamed.pop(None, None)
    save_file(renamed, file, {"format": "pt"})


def change_json(file: Path, **sections: dict) -> None:
    """Changes keys of a JSON file: of a section or, in the section `top`, of the whole."""
    stored = json.loads(file.read_text())
    for section, keys in sections.items():
        (stored if section == "top" else stored[section]).update(keys)
    file.write_text(json.dumps(stored))


def rows_and_answer(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, str]:
    """Both halves at work on one picture."""
    checkpoint = read_checkpoint(str(folder))
    encoder = load_encoder(checkpoint, dtype=dtype, device="cpu")
    decoder = load_decoder(checkpoint, dtype=dtype, device="cpu")
    frame = checkpoint.geometry.frame(SIZE)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, frame.shape, np.uint8))
    [[region]] = encoder.regions([pixels], [SIZE], "joint")
    span = checkpoint.geometry.span(SIZE, np.arange(len(region.features)), checkpoint.image_token)
    prompt = decoder.encode_prompt("describe")
    [completion] = decoder.generate([[(region.features, span)]], [prompt], max_new_tokens=8)
    assert completion.num_prompt_tokens == len(span) + sum(map(len, prompt))
    return region.features, completion.text


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
    found = rows_and_answer(folder)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] != ""


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = make_smolvlm(tmp_path, tie=True)
    model = load_decoder(read_checkpoint(str(folder)), **CPU).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.std() > 0.5  # what was stored, and not what transformers draws for a missing weight


def test_shards_give_what_one_file_gives(tmp_path):
    whole, shards = make_smolvlm(tmp_path / "one"), make_smolvlm(tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert torch.equal(rows_and_answer(whole)[0], rows_and_answer(shards)[0])
    assert rows_and_answer(whole)[1] == rows_and_answer(shards)[1] != ""


def test_each_half_holds_its_own_weights_and_nothing_else(tmp_path):
    folder = make_smolvlm(tmp_path)
    checkpoint = read_checkpoint(str(folder))
    encoder: Any = load_encoder(checkpoint, **CPU)
    tower, language = encoder.state_dict(), load_decoder(checkpoint, **CPU).model.state_dict()
    assert {part.split(".")[0] for part in tower} == {"tower", "projector"}
    assert {part.split(".")[0] for part in language} == {"model", "lm_head"}
    assert len(tower) + len(language) == len(load_file(folder / "model.safetensors"))
    for part, load in (("vision_model", load_encoder), ("connector", load_encoder), ("text_model", load_decoder)):
        folder = make_smolvlm(tmp_path / part)
        rename(folder, lambda weight, part=part: None if f"{part}." in weight else weight)
        other = load_decoder if load is load_encoder else load_encoder
        other(read_checkpoint(str(folder)), **CPU)
        with pytest.raises(CheckpointError, match="lacks"):
            load(read_checkpoint(str(folder)), **CPU)


def test_halves_in_bfloat16_answer(tmp_path):
    rows, text = rows_and_answer(make_smolvlm(tmp_path), torch.bfloat16)
    exact, _ = rows_and_answer(tmp_path)
    assert rows.dtype == torch.bfloat16
    assert text != ""
    assert (rows.float() - exact).norm() < 0.05 * exact.norm()  # bfloat16 has 8 bits


def test_there_is_nothing_to_choose_by_a_class_token_or_before_the_connector(tmp_path):
    checkpoint = read_checkpoint(str(make_smolvlm(tmp_path)))
    with pytest.raises(ValueError, match="attention of a class token is not computed for SmolVLM"):
        load_encoder(checkpoint, **CPU, attention=True)
    with pytest.raises(ValueError, match="behind"):
        load_encoder(checkpoint, **CPU).regions([], [], "joint", before_projector=True)


# Multiply-adds


@pytest.mark.parametrize(("size", "crops"), [((310, 90), 4), (SIZE, 7)])
def test_tower_and_connector_are_counted_as_they_multiply(tmp_path, size, crops):
    checkpoint = read_checkpoint(str(make_smolvlm(tmp_path)))
    encoder, frame = load_encoder(checkpoint, **CPU), checkpoint.geometry.frame(size)
    assert frame.num_crops == crops
    # The counter does not know the CPU's fused attention, but its matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder.regions([torch.zeros(frame.shape, dtype=torch.uint8)], [size], "joint")
    found = vision_flops(checkpoint.vision, crops=crops) + projector_flops(checkpoint.shape, crops=crops)
    assert counter.get_total_flops() == 2 * found


def test_true_flops_follow_from_the_number_of_crops(tmp_path):
    checkpoint = read_checkpoint(str(make_smolvlm(tmp_path)))
    num_visual = checkpoint.geometry.num_visual(SIZE)
    pruned = true_flops(checkpoint.shape, "otprune", num_text=40, crops=7, retention=0.33)
    assert pruned.vision == 7 * vision_flops(checkpoint.vision)
    assert pruned.projector == 7 * projector_flops(checkpoint.shape)
    assert pruned.prefill == prefill_flops(checkpoint.language, 40 + num_kept(0.33, num_visual))


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
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer_there_are_no_labels(tmp_path):
    folder = make_smolvlm(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="must hold the tokenizer of a SmolVLM: ") as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_statistics_of_a_processor_that_stores_none_are_siglips(tmp_path):
    folder = make_smolvlm(tmp_path)
    file = folder / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stored.items() if not key.startswith("image_")}))
    assert read_checkpoint(str(folder)).mean == (0.5, 0.5, 0.5)


INSIDE, CLASS, MADE = "looks inside the language model", "reads the attention of a class token", "makes tokens of"
REFUSED = {
    **dict.fromkeys(("fastv", "vtw", "fitprune", "pyramiddrop"), INSIDE),
    **dict.fromkeys(("prumerge", "prumerge_plus"), CLASS),
    "m3": MADE,
}


def test_methods_that_have_not_been_tried_are_refused_in_one_line(tmp_path):
    checkpoint = read_checkpoint(str(make_smolvlm(tmp_path)))
    for method in METHODS.values():
        reason = checkpoint.record.refuses(method, checkpoint)
        if expected := REFUSED.get(method.name):
            assert reason is not None
            assert f"method {method.name} {expected}" in reason
            assert "\n" not in reason
        else:
            assert reason is None, (method.name, reason)
