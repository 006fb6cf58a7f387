"""What holds of every family's checkpoint: shards, tied heads, halves, methods, and its multiply-adds."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from otprune import num_kept
from otprune.flops import prefill_flops, projector_flops, true_flops, vision_flops
from otprune.methods import METHODS
from otprune.models import CheckpointError, check_weights, load_decoder, load_encoder, read_checkpoint
from otprune.models.relevance import make_relevance
from tests.otprune.families.loading import (
    CPU,
    assert_same_answer,
    change_json,
    in_layout_of_later_versions,
    rename,
    rows_and_answer,
    stored_names,
)
from tests.tiny import MAKERS

QWEN = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
OF_QWEN = {"visual.blocks": load_encoder, "layers.": load_decoder}
OF_LLAVAS = {"vision_tower.": load_encoder, "projector.": load_encoder, "language_model.": load_decoder}
OF_IDEFICS = {"vision_model.": load_encoder, "connector.": load_encoder, "text_model.": load_decoder}
PARTS = {
    **{family: OF_QWEN for family in QWEN},
    **{family: OF_LLAVAS for family in ("internvl", "mistral3", "gemma3")},
    **{family: OF_IDEFICS for family in ("smolvlm", "idefics3")},
}
"""family -> {part of the names of weights: the half that needs them}"""


ALIKE = ("qwen3_vl_moe", "qwen3_5", "idefics3", "gemma3")  # files of these are named and read as their siblings'


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in PARTS])
def family(request) -> str:
    return request.param


@pytest.mark.slow
def test_shards_give_what_one_file_gives(family, tmp_path):
    whole, shards = MAKERS[family](tmp_path / "one"), MAKERS[family](tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert (shards / "model.safetensors.index.json").is_file()
    expected, found = rows_and_answer(whole), rows_and_answer(shards)
    assert torch.equal(expected[0], found[0])
    assert expected[1] == found[1] != ""


@pytest.mark.parametrize("said_by", ["both", "the whole model alone", "the language model alone"])
def test_a_tied_head_is_the_embedding(family, said_by, tmp_path):
    folder = MAKERS[family](tmp_path, tie=True)
    assert not any("lm_head" in stored for stored in stored_names(folder))
    if said_by != "both":
        whole = said_by == "the whole model alone"
        tied = {"top": {"tie_word_embeddings": whole}, "text_config": {"tie_word_embeddings": not whole}}
        change_json(folder / "config.json", **tied)
    if family in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5") and said_by == "the language model alone":
        with pytest.raises(CheckpointError, match="lacks 1 weights"):  # their class ties by the whole model's key
            load_decoder(read_checkpoint(str(folder)), **CPU)
        return
    model = causal_of(load_decoder(read_checkpoint(str(folder)), **CPU))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.std() > 0.5  # what was stored, and not what transformers draws for a missing weight


def test_a_head_of_its_own_stays_that_where_the_whole_models_configuration_ties_it(family, tmp_path):
    """A released configuration may lack the key, whose default ties heads in transformers' class."""
    folder = MAKERS[family](tmp_path)
    change_json(folder / "config.json", top={"tie_word_embeddings": True})
    model = causal_of(load_decoder(read_checkpoint(str(folder)), **CPU))
    [name] = (name for name in stored_names(folder) if name.endswith("lm_head.weight"))
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")[name])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("internvl", "vision_tower.embeddings.cls_token"), ("mistral3", "vision_tower.patch_conv.weight")],
)
def test_both_layouts_of_names_load(name, weight, tmp_path):
    folder = MAKERS[name](tmp_path)
    stored = {weight, "multi_modal_projector.", "language_model.model.norm.weight", "language_model.lm_head.weight"}
    assert {each.split(".")[0] for each in stored_names(folder)} == {each.split(".")[0] for each in stored}
    expected = rows_and_answer(folder)
    rename(folder, in_layout_of_later_versions)
    assert {f"model.{weight}", "model.language_model.norm.weight", "lm_head.weight"} <= stored_names(folder)
    assert_same_answer(folder, expected)


# Halves


def test_each_half_holds_its_own_weights_and_nothing_else(family, tmp_path):
    folder = MAKERS[family](tmp_path)
    checkpoint = read_checkpoint(str(folder))
    check_weights(checkpoint)  # finds every name, too
    tower, language = load_encoder(checkpoint, **CPU), causal_of(load_decoder(checkpoint, **CPU))
    assert isinstance(tower, torch.nn.Module)
    assert {name.split(".")[0] for name in tower.state_dict()} == (
        {"tower"} if family in QWEN else {"tower", "projector"}
    )
    assert {name.split(".")[0] for name in language.state_dict()} == {"model", "lm_head"}
    assert len(tower.state_dict()) + len(language.state_dict()) == len(stored_names(folder))


def test_each_half_loads_without_the_other(family, tmp_path):
    """Whatever of the other half is large need not be there, so it is not read."""
    for i, (part, load) in enumerate(PARTS[family].items()):
        folder = MAKERS[family](tmp_path / str(i))
        before = len(stored_names(folder))
        rename(folder, lambda name, part=part: None if part in name else name)
        assert len(stored_names(folder)) < before
        other = load_decoder if load is load_encoder else load_encoder
        other(read_checkpoint(str(folder)), **CPU)
        with pytest.raises(CheckpointError, match="lacks"):
            load(read_checkpoint(str(folder)), **CPU)


@pytest.mark.slow
def test_halves_in_bfloat16_answer(family, tmp_path):
    rows, text = rows_and_answer(MAKERS[family](tmp_path), torch.bfloat16)
    exact, _ = rows_and_answer(tmp_path)
    assert rows.dtype == torch.bfloat16
    assert text != ""
    assert (rows.float() - exact).norm() < 0.05 * exact.norm()  # bfloat16 has 8 bits


def test_there_is_nothing_to_choose_by_a_class_token_or_before_the_projector(family, tmp_path):
    checkpoint = read_checkpoint(str(MAKERS[family](tmp_path)))
    says = f"(no class token|class token is not computed for {checkpoint.record.title})"
    with pytest.raises(ValueError, match=says):
        load_encoder(checkpoint, **CPU, attention=True)
    with pytest.raises(ValueError, match="behind"):
        load_encoder(checkpoint, **CPU).regions([], [], "joint", before_projector=True)


# Methods

INSIDE, CLASS, MADE = (
    "(looks inside the language model|works on the attention and the key-value cache of every layer)",
    "reads the attention of a class token",
    "makes tokens of several",
)
REFUSED = {
    **dict.fromkeys(("fastv", "vtw", "fitprune", "pyramiddrop"), INSIDE),
    **dict.fromkeys(("prumerge", "prumerge_plus"), CLASS),
    "m3": MADE,
}


def test_methods_that_have_not_been_tried_are_refused_in_one_line(family, tmp_path):
    checkpoint = read_checkpoint(str(MAKERS[family](tmp_path)))
    for method in METHODS.values():
        reason = checkpoint.record.refuses(method, checkpoint)
        if expected := REFUSED.get(method.name):
            assert reason is not None
            assert re.search(f"method {method.name} {expected}", reason)
            assert "\n" not in reason
        else:
            assert reason is None, (method.name, reason)
    cdpruner = METHODS["cdpruner"]
    refused = checkpoint.record.refuses(cdpruner, checkpoint, cdpruner.check({"relevance": "clip"}))
    assert refused is not None
    assert "settings.relevance of cdpruner must be words or none" in refused
    for relevance in ("words", "none"):
        assert checkpoint.record.refuses(cdpruner, checkpoint, cdpruner.check({"relevance": relevance})) is None


def test_words_of_the_prompt_have_a_relevance(family, tmp_path):
    folder = MAKERS[family](tmp_path)
    tokens = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    model = load_decoder(read_checkpoint(str(folder)), **CPU)
    embedding = model.model.get_input_embeddings().weight
    words = torch.tensor(model.tokenizer("a red cat", add_special_tokens=False).input_ids)
    expected = torch.nn.functional.cosine_similarity(tokens[0][:, None], embedding[words][None], dim=-1).mean(dim=1)
    relevance = make_relevance({"relevance": "words"}, folder, torch.float32, "cpu")
    torch.testing.assert_close(relevance(None, tokens, ["a red cat"])[0], expected)


# Multiply-adds of towers that are no Qwen's (test_qwen_flops.py has those)


@pytest.mark.parametrize("size", [(60, 60), (310, 130), (150, 260)])
@pytest.mark.parametrize("name", ["internvl", "mistral3", "smolvlm"])
def test_tower_and_projector_are_counted_as_they_multiply(name, size, tmp_path):
    checkpoint = read_checkpoint(str(MAKERS[name](tmp_path)))
    encoder, frame = load_encoder(checkpoint, **CPU), checkpoint.geometry.frame(size)
    # The counter does not know the CPU's fused attention, but its matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder.regions([torch.zeros(frame.shape, dtype=torch.uint8)], [size], "joint")
    given = tower_input(checkpoint, size)
    found = vision_flops(checkpoint.vision, **given) + projector_flops(checkpoint.shape, **given)
    assert counter.get_total_flops() == 2 * found


@pytest.mark.parametrize("name", ["internvl", "mistral3", "smolvlm"])
def test_true_flops_follow_from_the_picture(name, tmp_path):
    checkpoint, size = read_checkpoint(str(MAKERS[name](tmp_path))), (150, 260)
    num_visual, given = checkpoint.geometry.num_visual(size), tower_input(checkpoint, size)
    whole = true_flops(checkpoint.shape, "none", num_text=20, **given)
    pruned = true_flops(checkpoint.shape, "otprune", num_text=20, **given, retention=0.2)
    assert whole.vision == pruned.vision == vision_flops(checkpoint.vision, **given)
    assert whole.projector == pruned.projector == projector_flops(checkpoint.shape, **given)
    assert whole.prefill == prefill_flops(checkpoint.language, 20 + num_visual)
    assert pruned.prefill == prefill_flops(checkpoint.language, 20 + num_kept(0.2, num_visual))


def causal_of(decoder) -> torch.nn.Module:
    """The language model with its head; Gemma 3's stands in a module that makes its masks."""
    return getattr(decoder.model, "causal", decoder.model)


def tower_input(checkpoint, size) -> dict:
    """What the tower's multiply-adds depend on: the sides of a picture that keeps its shape, else a number of crops."""
    frame = checkpoint.geometry.frame(size)
    return {"crops": frame.num_crops} if checkpoint.geometry.tiled else {"frame": (frame.height, frame.width)}
