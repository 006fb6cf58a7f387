"""Finding a checkpoint, reading it however it is laid out, naming its weights; one clear line for what is none."""

import json
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from otprune.families import FAMILIES, Options
from otprune.families.family import CLIP_MEAN, CLIP_STD
from otprune.models import (
    CheckpointError,
    check_weights,
    checkpoint,
    load_decoder,
    load_encoder,
    load_prompter,
    read_checkpoint,
    resolve_checkpoint,
    weights_digest,
)
from otprune.models.checkpoint import image_processor, read_header

CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def copy(demo_model, tmp_path) -> Path:
    return Path(shutil.copytree(demo_model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def halves(demo_model):
    return load_encoder(demo_model, **CPU).state_dict(), load_decoder(demo_model, **CPU).model.state_dict()


def assert_same_weights(folder: Path, halves) -> None:
    for got, expected in zip((load_encoder(folder, **CPU), load_decoder(folder, **CPU).model), halves, strict=True):
        assert got.state_dict().keys() == expected.keys()
        for name, tensor in got.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def error_of(path: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change) -> None:
    """Replaces the weights by what `change` makes of the dict of tensors."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


# Layouts


@pytest.mark.parametrize("shard_size", ["100KB", "1MB"])
def test_a_sharded_checkpoint_is_read(demo_model, copy, halves, shard_size):
    whole = LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float16)
    (copy / "model.safetensors").unlink()
    whole.save_pretrained(copy, max_shard_size=shard_size)
    assert len(list(copy.glob("*.safetensors"))) > 4
    assert_same_weights(copy, halves)


def test_the_names_that_transformers_5_gives_its_modules_are_read(copy, halves):
    def rename(name: str) -> str:
        name = name.replace("language_model.model.", "language_model.").replace("vision_model.", "")
        return name if name.startswith("language_model.lm_head") else f"model.{name}"

    rewrite(copy, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert any(name.startswith("model.vision_tower.encoder.") for name in load_file(copy / "model.safetensors"))
    assert_same_weights(copy, halves)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_of_its_own_is_read_under_either_name(copy, name):
    config = json.loads((copy / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (copy / "config.json").write_text(json.dumps(config))
    head = torch.randn(128, 192)
    rewrite(copy, lambda tensors: tensors | {name: head})
    torch.testing.assert_close(load_decoder(copy, **CPU).model.lm_head.weight.data, head)


@pytest.mark.parametrize(
    ("load", "own"), [(load_encoder, ("vision_tower", "multi_modal_projector")), (load_decoder, ("language_model",))]
)
def test_a_half_loads_where_the_other_is_missing(copy, load, own):
    rewrite(copy, lambda tensors: {name: t for name, t in tensors.items() if name.startswith(own)})
    load(copy, **CPU)


@pytest.mark.parametrize(
    ("load", "lost", "module"),
    [
        (load_encoder, "vision_tower.vision_model.embeddings.class_embedding", "CLIPVisionModel"),
        (load_encoder, "multi_modal_projector.linear_2.bias", "LlavaMultiModalProjector"),
        (load_decoder, "language_model.model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM"),
    ],
)
def test_missing_weights_are_named(copy, load, lost, module):
    rewrite(copy, lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=f"lacks 1 weights of {module}, e.g. .*{lost.split('.')[-1]}"):
        load(copy, **CPU)
    with pytest.raises(CheckpointError, match=f"lacks 1 weights of {module}, e.g. .*{lost.split('.')[-1]}"):
        check_weights(read_checkpoint(str(copy)))  # which reads no values


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vision_tower.vision_model.embeddings.class_embedding", "embeddings.class_embedding of CLIPVisionModel in"),
        ("multi_modal_projector.linear_2.bias", "what config.json says: .*size mismatch for linear_2.bias"),
        ("language_model.model.norm.weight", "model.norm.weight of LlamaForCausalLM in shape"),
    ],
)
def test_weights_of_another_shape_than_the_configuration_says_are_refused_by_their_headers(copy, name, words):
    rewrite(copy, lambda tensors: tensors | {name: torch.zeros(7)})
    with pytest.raises(CheckpointError, match=words) as refused:
        check_weights(read_checkpoint(str(copy)))
    assert "\n" not in str(refused.value)


def test_a_checkpoint_without_an_end_token_is_refused(copy):
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((copy / file).read_text())
        for part in (content, content.get("text_config", {})):
            part.pop("eos_token_id", None)
            part.pop("eos_token", None)
        if "text_config" in content:
            content["text_config"]["eos_token_id"] = None
        (copy / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must name an end token"):
        load_decoder(copy, **CPU)


# Finding


def test_a_folder_and_a_cached_hub_repository_are_found(demo_model, tmp_path, monkeypatch):
    assert resolve_checkpoint(str(demo_model)) == demo_model
    repository = tmp_path / "models--someone--llava-demo"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(demo_model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_checkpoint("someone/llava-demo") == snapshot


def test_what_is_nowhere_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "must be a folder or a hub repository `owner/name`, got './absent'" in error_of("./absent")
    assert "must be a folder or a hub repository" in error_of("/absent/model")
    assert "neither a folder here" in error_of("someone/absent")
    assert "nor a hub repository in reach" in error_of("not a/valid name!")


def test_what_is_no_llava_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert f"families {', '.join(FAMILIES)}, got model_type 'llama'" in error_of(str(copy))
    (copy / "config.json").write_text("{")
    assert "config.json must be JSON" in error_of(str(copy))
    (copy / "config.json").write_text("[]")
    assert "config.json must hold an object" in error_of(str(copy))
    (copy / "config.json").unlink()
    assert "must be a folder with a config.json, found none in" in error_of(str(copy))


def test_a_model_without_weights_is_named(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    assert "must hold *.safetensors weights, found none in" in error_of(str(copy))
    assert "but pytorch_model.bin: pickled weights are programs and never read" in error_of(str(copy))


def test_weights_and_other_files_lie_in_the_folder_and_are_files(copy, tmp_path):
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "../other/model.safetensors"}}))
    assert "must list files of its own folder, got '../other/model.safetensors'" in error_of(str(copy))
    index.unlink()
    os.mkfifo(copy / "added_tokens.json")
    assert "must hold files and folders, got " in error_of(str(copy))


@pytest.mark.parametrize("size", [0, 5, 1000, 100_000])
def test_weights_cut_short_by_a_download_are_named(copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors must be a whole safetensors file" in error_of(str(copy))


def test_weights_that_are_something_else_are_named(copy):
    for content in (b"version https://git-lfs.github.com/spec/v1\n", (2).to_bytes(8, "little") + b"{]" + b"x" * 99):
        (copy / "model.safetensors").write_bytes(content)
        assert "must be a" in error_of(str(copy))
        assert "safetensors file" in error_of(str(copy))


def test_an_absent_shard_is_named(demo_model, copy):
    (copy / "model.safetensors").unlink()
    whole = LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float16)
    whole.save_pretrained(copy, max_shard_size="1MB")
    lost = sorted(copy.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"found no {lost.name}" in error_of(str(copy))


def test_image_statistics_stand_in_either_file_or_are_clips(tmp_path):
    def statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
        processor = image_processor(tmp_path)
        return processor.mean, processor.std

    assert statistics() == (CLIP_MEAN, CLIP_STD)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    assert statistics() == ((0.1, 0.2, 0.3), (1, 2, 3))
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"image_mean": [0.5], "image_std": [0.6]}}')
    assert statistics() == ((0.5,), (0.6,))
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14}')
    assert statistics() == ((0.1, 0.2, 0.3), (1, 2, 3))


@pytest.mark.parametrize("stored", ["{broken", "[]", "{}"])
def test_a_broken_index_of_weights_is_one_line(stored, copy):
    (copy / checkpoint.INDEX).write_text(stored)
    with pytest.raises(CheckpointError, match="must be JSON with a weight_map"):
        read_checkpoint(str(copy))


@pytest.mark.parametrize("stored", ["{broken", "[]", '{"image_mean": null}', '{"image_mean": [0.5, 0.5, 0.5]}'])
@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_a_broken_image_processor_is_one_line(name, stored, tmp_path):
    (tmp_path / name).write_text(stored)
    with pytest.raises(CheckpointError, match=f"{name} must hold the settings of an image processor: "):
        image_processor(tmp_path)


def test_the_mean_of_a_processor_is_a_colour(tmp_path):
    assert image_processor(tmp_path).color == (122, 116, 104)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0, 1], "image_std": [1, 1, 1]}')
    assert image_processor(tmp_path).color == (127, 0, 255)


# What a job asks


def test_a_checkpoint_says_of_the_demo_model_what_the_loaded_model_says(demo_model):
    found = read_checkpoint(str(demo_model))
    encoder, prompter = load_encoder(demo_model, **CPU), load_prompter(demo_model)
    assert (found.path, found.name, found.family) == (demo_model, str(demo_model), "llava")
    geometry = found.geometry
    assert (geometry.fixed, geometry.most_visual, geometry.axes) == (encoder.num_tokens, encoder.num_tokens, 1)
    assert geometry.frame((70, 90)).shape == (encoder.tower.config.image_size, encoder.tower.config.image_size, 3)
    assert (found.vision.image_size, found.language.hidden) == (encoder.tower.config.image_size, encoder.row_width)
    assert (found.row_width, found.levels) == (encoder.row_width, 0)
    torch.testing.assert_close(torch.tensor(found.mean), encoder.normalize.mean)
    torch.testing.assert_close(torch.tensor(found.std), encoder.normalize.std)
    assert (found.image_token, found.language_type) == (prompter.image_token, "llama")
    assert (geometry.tiled, found.whole_geometry, found.options) == (False, geometry, Options(aspect="pad"))
    assert found.record is FAMILIES["llava"]
    assert found.record.architecture in json.loads((demo_model / "config.json").read_text())["architectures"]
    assert found.digest == weights_digest(demo_model)


def test_a_checkpoint_of_tiles_has_their_resolutions_and_most_tokens(copy):
    config = json.loads((copy / "config.json").read_text())
    side = config["vision_config"]["image_size"]
    pinpoints = [[side, 2 * side], [3 * side, side], [2 * side, 2 * side]]
    config |= {"model_type": "llava_next", "image_grid_pinpoints": pinpoints}
    (copy / "config.json").write_text(json.dumps(config))
    found = read_checkpoint(str(copy))
    geometry = found.geometry
    assert geometry.tiled
    assert geometry.resolutions == tuple(map(tuple, pinpoints))
    assert (geometry.fixed, geometry.num_tokens, geometry.most_visual) == (
        None,
        256,
        256 + 32 * 33,
    )  # a newline token a row
    assert geometry.most_bytes == 5 * 3 * side**2


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_the_geometry_is_read_with_the_users_options(demo_model, aspect):
    found = read_checkpoint(str(demo_model), Options(aspect=aspect))
    assert (found.geometry.frame((30, 40)).fit, found.options) == (aspect, Options(aspect=aspect))


@pytest.mark.parametrize("option", ["max_pixels", "min_pixels"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_model_of_one_picture_size_takes_no_number_of_pixels(copy, family, option):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": family}))
    with pytest.raises(CheckpointError, match=r"model\.min_pixels must be null: the tower sees squares of one size"):
        read_checkpoint(str(copy), Options(**{option: 10_000}))


def test_a_class_token_that_the_model_keeps_is_a_visual_token(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    geometry = read_checkpoint(str(copy)).geometry
    assert geometry.fixed == load_encoder(copy, **CPU).num_tokens == 257
    assert geometry.grid((10, 10)) == (0, 0), "257 tokens form no square"


def test_a_checkpoint_travels(demo_model):
    found = read_checkpoint(str(demo_model))
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("part", [{"hidden_size": "wide"}, {"model_type": "no model"}, {"num_attention_heads": 0}])
def test_a_configuration_that_describes_no_model_is_one_clear_line(copy, part):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | part}))
    with pytest.raises(CheckpointError, match=r"config\.json must describe a model of LLaVA-1\.5: ") as caught:
        read_checkpoint(str(copy))
    assert "\n" not in str(caught.value)


# The name of the weights


def test_the_digest_is_that_of_the_content_and_not_of_place_or_time(demo_model, copy):
    assert weights_digest(copy) == weights_digest(demo_model)
    assert len(weights_digest(copy)) == 16


def test_the_digest_changes_with_any_weight(copy):
    before = weights_digest(copy)

    def nudge(tensors):
        tensors["language_model.model.norm.weight"][0] += 0.5
        return tensors

    rewrite(copy, nudge)
    assert weights_digest(copy) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_the_digest_changes_with_tokenizer_template_and_configuration(copy, name):
    before = weights_digest(copy)
    (copy / name).write_text((copy / name).read_text() + " ")
    assert weights_digest(copy) != before


def test_the_digest_of_a_large_file_samples_every_tensor(copy, monkeypatch):
    monkeypatch.setattr(checkpoint, "WHOLE_FILE_BYTES", 2**20)
    file = copy / "model.safetensors"
    before = weights_digest(copy)
    original = file.read_bytes()
    header, begin = read_header(file)
    assert len(original) > 2**20
    for name, tensor in list(header.items())[::10]:
        start, stop = tensor["data_offsets"]
        for offset in (start, (start + stop) // 2, stop - 1):
            changed = bytearray(original)
            changed[begin + offset] ^= 1
            file.write_bytes(changed)
            assert weights_digest(copy) != before, name
    file.write_bytes(original.replace(b"layer_norm1", b"layer_norm9", 1))
    assert weights_digest(copy) != before
    file.write_bytes(original)
    assert weights_digest(copy) == before
