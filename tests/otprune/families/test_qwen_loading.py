"""Checkpoints of Qwen2.5-VL and Qwen3-VL as they are published: names, shards, tied heads, flat configurations."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from otprune.families import Options
from otprune.methods import METHODS
from otprune.models import CheckpointError, load_decoder, load_encoder, load_prompter, read_checkpoint
from otprune.models.relevance import make_relevance
from tests.tiny import MAKERS

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]
CPU = {"dtype": torch.float32, "device": "cpu"}
SIZE = (150, 260)


def make(name: str, folder: Path, **options) -> Path:
    return MAKERS[name](folder / name, **options)


def rename(folder: Path, change) -> None:
    """Stores the weights under the names that `change` gives; None leaves a weight out."""
    file = folder / "model.safetensors"
    renamed = {change(name): tensor for name, tensor in load_file(file).items()}
    renamed.pop(None, None)
    save_file(renamed, file, {"format": "pt"})


def rows_and_answer(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, str]:
    """Both halves at work on one picture."""
    checkpoint = read_checkpoint(str(folder))
    encoder = load_encoder(checkpoint, dtype=dtype, device="cpu")
    decoder = load_decoder(checkpoint, dtype=dtype, device="cpu")
    frame = checkpoint.geometry.frame(SIZE)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, frame.shape, np.uint8))
    [[region]] = encoder.regions([pixels], [SIZE], "joint")
    rows = region.features if region.rows is None else region.rows
    span = checkpoint.geometry.span(SIZE, np.arange(len(rows)), checkpoint.image_token)
    [completion] = decoder.generate([[(rows, span)]], [decoder.encode_prompt("describe")], max_new_tokens=8)
    return rows, completion.text


def stored_names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


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
    found = rows_and_answer(folder)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] != ""


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_give_what_one_file_gives(name, tmp_path):
    whole = make(name, tmp_path)
    shards = make(name, tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert (shards / "model.safetensors.index.json").is_file()
    assert torch.equal(rows_and_answer(whole)[0], rows_and_answer(shards)[0])
    assert rows_and_answer(whole)[1] == rows_and_answer(shards)[1] != ""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tied_head_is_the_embedding(name, tmp_path):
    folder = make(name, tmp_path, tie=True)
    assert not any("lm_head" in stored for stored in stored_names(folder))
    model = load_decoder(read_checkpoint(str(folder)), **CPU).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.std() > 0.5  # what was stored, and not what transformers draws for a missing weight


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
    found = rows_and_answer(folder)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


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
def test_each_half_holds_its_own_weights_and_nothing_else(name, tmp_path):
    folder = make(name, tmp_path)
    checkpoint = read_checkpoint(str(folder))
    tower = load_encoder(checkpoint, **CPU).state_dict()
    language = load_decoder(checkpoint, **CPU).model.state_dict()
    assert {part.split(".")[0] for part in tower} == {"tower"}
    assert {part.split(".")[0] for part in language} == {"model", "lm_head"}
    stored = stored_names(folder)
    assert len(tower) == sum("visual." in weight for weight in stored)
    assert len(tower) + len(language) == len(stored)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_half_loads_without_the_others_layers(name, tmp_path):
    """Whatever of the other half is large need not be there, so it is not read."""
    folder = make(name, tmp_path)
    rename(folder, lambda weight: None if "visual.blocks" in weight else weight)
    load_decoder(read_checkpoint(str(folder)), **CPU)
    with pytest.raises(CheckpointError, match="lacks"):
        load_encoder(read_checkpoint(str(folder)), **CPU)
    folder = make(name, tmp_path / "again")
    rename(folder, lambda weight: weight if "visual." in weight else None)
    load_encoder(read_checkpoint(str(folder)), **CPU)
    with pytest.raises(CheckpointError, match="lacks"):
        load_decoder(read_checkpoint(str(folder)), **CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_in_bfloat16_answer(name, tmp_path):
    rows, text = rows_and_answer(make(name, tmp_path), torch.bfloat16)
    exact, _ = rows_and_answer(tmp_path / name)
    assert rows.dtype == torch.bfloat16
    assert text != ""
    assert (rows.float() - exact).norm() < 0.05 * exact.norm()  # bfloat16 has 8 bits


def test_the_tower_has_no_class_token_and_nothing_to_choose_before_its_mergers(tmp_path):
    checkpoint = read_checkpoint(str(make("qwen3_vl", tmp_path)))
    with pytest.raises(ValueError, match="no class token"):
        load_encoder(checkpoint, **CPU, attention=True)
    with pytest.raises(ValueError, match="behind"):
        load_encoder(checkpoint, **CPU).regions([], [], "joint", before_projector=True)


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


# Methods

INSIDE, CLASS, PLACE = (
    "looks inside the language model",
    "reads the attention of a class token",
    "makes tokens of several",
)
REFUSED = {
    **dict.fromkeys(("fastv", "vtw", "fitprune", "pyramiddrop"), INSIDE),
    **dict.fromkeys(("prumerge", "prumerge_plus"), CLASS),
    "m3": PLACE,
}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_methods_that_cannot_work_are_refused_in_one_line(name, tmp_path):
    checkpoint = read_checkpoint(str(make(name, tmp_path)))
    for method in METHODS.values():
        reason = checkpoint.record.refuses(method, checkpoint)
        if expected := REFUSED.get(method.name):
            assert reason is not None
            assert f"method {method.name} {expected}" in reason
            assert "\n" not in reason
        else:
            assert reason is None, (method.name, reason)
    cdpruner = METHODS["cdpruner"]
    refused = checkpoint.record.refuses(cdpruner, checkpoint, cdpruner.check({"relevance": "clip"}))
    assert refused is not None
    assert "settings.relevance of cdpruner must be words or none" in refused
    for relevance in ("words", "none"):
        assert checkpoint.record.refuses(cdpruner, checkpoint, cdpruner.check({"relevance": relevance})) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_words_of_the_prompt_have_a_relevance(name, tmp_path):
    folder = make(name, tmp_path)
    tokens = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    model = load_decoder(read_checkpoint(str(folder)), **CPU)
    embedding = model.model.get_input_embeddings().weight
    words = torch.tensor(model.tokenizer("a red cat", add_special_tokens=False).input_ids)
    expected = torch.nn.functional.cosine_similarity(tokens[0][:, None], embedding[words][None], dim=-1).mean(dim=1)
    relevance = make_relevance({"relevance": "words"}, folder, torch.float32, "cpu")
    torch.testing.assert_close(relevance(None, tokens, ["a red cat"])[0], expected)


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
    found = rows_and_answer(folder)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] != ""
