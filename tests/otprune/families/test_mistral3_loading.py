"""Checkpoints of Mistral-Small-3: names, tokens, tied heads, halves, multiply-adds, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from otprune import num_kept
from otprune.flops import prefill_flops, projector_flops, true_flops, vision_flops
from otprune.methods import METHODS
from otprune.models import CheckpointError, load_decoder, load_encoder, read_checkpoint
from otprune.models.relevance import make_relevance
from tests.tiny import make_mistral3

CPU = {"dtype": torch.float32, "device": "cpu"}
SIZE = (130, 260)  # 6 x 11 tokens


def rename(folder: Path, change) -> None:
    """Stores the weights under the names that `change` gives; None leaves a weight out."""
    file = folder / "model.safetensors"
    renamed = {change(name): tensor for name, tensor in load_file(file).items()}
    renamed.pop(None, None)
    save_file(renamed, file, {"format": "pt"})


def configure(folder: Path, **sections: dict) -> None:
    """Changes keys of config.json: of a section or, in the section `top`, of the whole."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for section, keys in sections.items():
        (config if section == "top" else config[section]).update(keys)
    file.write_text(json.dumps(config))


def stored_names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


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
    return region.features, completion.text


# Names


def test_both_layouts_of_names_load(tmp_path):
    folder = make_mistral3(tmp_path)
    assert {re.sub(r"\..*", "", name) for name in stored_names(folder)} == {
        *("vision_tower", "multi_modal_projector", "language_model")
    }
    expected = rows_and_answer(folder)
    rename(
        folder,
        lambda name: re.sub(
            r"^(?!lm_head)", "model.", re.sub(r"^language_model\.(model\.)?", r"language_model.", name)
        ).replace("model.language_model.lm_head", "lm_head"),
    )
    assert {"model.vision_tower.patch_conv.weight", "model.language_model.norm.weight", "lm_head.weight"} <= (
        stored_names(folder)
    )
    found = rows_and_answer(folder)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] != ""


def test_shards_give_what_one_file_gives(tmp_path):
    whole, shards = make_mistral3(tmp_path / "one"), make_mistral3(tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert torch.equal(rows_and_answer(whole)[0], rows_and_answer(shards)[0])
    assert rows_and_answer(whole)[1] == rows_and_answer(shards)[1] != ""


@pytest.mark.parametrize("said_by", ["both", "the whole model alone", "the language model alone"])
def test_a_tied_head_is_the_embedding(said_by, tmp_path):
    folder = make_mistral3(tmp_path, tie=True)
    assert not any("lm_head" in stored for stored in stored_names(folder))
    if said_by != "both":
        whole = said_by == "the whole model alone"
        configure(folder, top={"tie_word_embeddings": whole}, text_config={"tie_word_embeddings": not whole})
    model = load_decoder(read_checkpoint(str(folder)), **CPU).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.std() > 0.5  # what was stored, and not what transformers draws for a missing weight


def test_a_head_of_its_own_stays_that_where_the_whole_models_configuration_ties_it(tmp_path):
    """A released configuration may lack the key, whose default ties heads in transformers' class."""
    folder = make_mistral3(tmp_path)
    configure(folder, top={"tie_word_embeddings": True})
    model = load_decoder(read_checkpoint(str(folder)), **CPU).model
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["language_model.lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


# Halves


def test_each_half_holds_its_own_weights_and_nothing_else(tmp_path):
    folder = make_mistral3(tmp_path)
    checkpoint = read_checkpoint(str(folder))
    tower, language = load_encoder(checkpoint, **CPU).state_dict(), load_decoder(checkpoint, **CPU).model.state_dict()
    assert {part.split(".")[0] for part in tower} == {"tower", "projector"}
    assert {part.split(".")[0] for part in language} == {"model", "lm_head"}
    assert len(tower) + len(language) == len(stored_names(folder))
    for part, load in (("vision_tower", load_encoder), ("projector", load_encoder), ("language_model", load_decoder)):
        folder = make_mistral3(tmp_path / part)
        rename(folder, lambda weight, part=part: None if f"{part}." in weight else weight)
        other = load_decoder if load is load_encoder else load_encoder
        other(read_checkpoint(str(folder)), **CPU)
        with pytest.raises(CheckpointError, match="lacks"):
            load(read_checkpoint(str(folder)), **CPU)


def test_halves_in_bfloat16_answer(tmp_path):
    rows, text = rows_and_answer(make_mistral3(tmp_path), torch.bfloat16)
    exact, _ = rows_and_answer(tmp_path)
    assert rows.dtype == torch.bfloat16
    assert text != ""
    assert (rows.float() - exact).norm() < 0.05 * exact.norm()  # bfloat16 has 8 bits


def test_there_is_nothing_to_choose_by_a_class_token_or_before_the_projector(tmp_path):
    checkpoint = read_checkpoint(str(make_mistral3(tmp_path)))
    with pytest.raises(ValueError, match="tower of Mistral-Small-3 has no class token"):
        load_encoder(checkpoint, **CPU, attention=True)
    with pytest.raises(ValueError, match="behind"):
        load_encoder(checkpoint, **CPU).regions([], [], "joint", before_projector=True)


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
    with pytest.raises(CheckpointError, match=r"tokens \[IMG_BREAK\], \[IMG_END\], found none for \[IMG_BREAK\]$"):
        read_checkpoint(str(folder))
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"must hold the tokenizer of a Mistral-Small-3: ") as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    file.unlink()
    (folder / "tekken.json").write_text("{}")  # of a library of Mistral's own
    with pytest.raises(CheckpointError, match=r"tokenizer of a Mistral-Small-3: found no tokenizer.json$"):
        read_checkpoint(str(folder))


# Multiply-adds


@pytest.mark.parametrize("size", [(60, 40), (310, 100), SIZE])
def test_tower_and_projector_are_counted_as_they_multiply(tmp_path, size):
    checkpoint = read_checkpoint(str(make_mistral3(tmp_path)))
    encoder, frame = load_encoder(checkpoint, **CPU), checkpoint.geometry.frame(size)
    # The counter does not know the CPU's fused attention, but its matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder.regions([torch.zeros(frame.shape, dtype=torch.uint8)], [size], "joint")
    sides = (frame.height, frame.width)
    found = vision_flops(checkpoint.vision, frame=sides) + projector_flops(checkpoint.shape, frame=sides)
    assert counter.get_total_flops() == 2 * found


def test_the_language_model_is_counted_as_it_multiplies(tmp_path):
    checkpoint = read_checkpoint(str(make_mistral3(tmp_path)))
    model = load_decoder(checkpoint, **CPU).model
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(inputs_embeds=torch.randn(1, 31, 64), logits_to_keep=1)
    assert counter.get_total_flops() == 2 * prefill_flops(checkpoint.language, 31)


def test_true_flops_follow_from_the_picture(tmp_path):
    checkpoint = read_checkpoint(str(make_mistral3(tmp_path)))
    sides, num_visual = (6 * 14, 11 * 14), checkpoint.geometry.num_visual(SIZE)
    whole = true_flops(checkpoint.shape, "none", num_text=20, frame=sides)
    pruned = true_flops(checkpoint.shape, "otprune", num_text=20, frame=sides, retention=0.33)
    assert whole.vision == pruned.vision == vision_flops(checkpoint.vision, frame=sides)
    assert whole.projector == pruned.projector == projector_flops(checkpoint.shape, frame=sides)
    assert whole.prefill == prefill_flops(checkpoint.language, 20 + num_visual)
    assert pruned.prefill == prefill_flops(checkpoint.language, 20 + num_kept(0.33, num_visual))


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
    configure(folder, **sections)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [{"height": 150, "width": 150}, {"longest_edge": 0}])
def test_another_kind_of_size_is_refused_in_one_line(tmp_path, size):
    folder = make_mistral3(tmp_path)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    with pytest.raises(CheckpointError, match="size must hold a longest_edge of at least 1 pixel, got") as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    file.unlink()
    assert read_checkpoint(str(folder)).geometry.longest == 1024, "as transformers' image processor has it"


INSIDE, CLASS, MADE = "looks inside the language model", "reads the attention of a class token", "makes tokens of"
REFUSED = {
    **dict.fromkeys(("fastv", "vtw", "fitprune", "pyramiddrop"), INSIDE),
    **dict.fromkeys(("prumerge", "prumerge_plus"), CLASS),
    "m3": MADE,
}


def test_methods_that_have_not_been_tried_are_refused_in_one_line(tmp_path):
    checkpoint = read_checkpoint(str(make_mistral3(tmp_path)))
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


def test_words_of_the_prompt_have_a_relevance(tmp_path):
    folder = make_mistral3(tmp_path)
    tokens = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    model = load_decoder(read_checkpoint(str(folder)), **CPU)
    embedding = model.model.get_input_embeddings().weight
    words = torch.tensor(model.tokenizer("a red cat", add_special_tokens=False).input_ids)
    expected = torch.nn.functional.cosine_similarity(tokens[0][:, None], embedding[words][None], dim=-1).mean(dim=1)
    relevance = make_relevance({"relevance": "words"}, folder, torch.float32, "cpu")
    torch.testing.assert_close(relevance(None, tokens, ["a red cat"])[0], expected)
