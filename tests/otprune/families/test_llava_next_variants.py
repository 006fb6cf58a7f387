"""LLaVA-1.6 with other language models than Vicuna: their prompts, and their answers as transformers has them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from otprune.methods import get_method
from otprune.models import load_encoder, load_prompter, read_checkpoint
from otprune.models.checkpoint import CheckpointError
from tests.otprune.families import parity
from tests.otprune.families.loading import copied
from tests.otprune.families.parity import CPU, Model
from tests.tiny import TEXT, save_llava_next, save_tokenizer
from tests.tiny_llava import released_name

PROMPTS = [("describe it", [(100, 70)]), ("what is it?", [(60, 130)]), ("compare both", [(56, 56), (150, 90)])]
HALVES = (0.5, 0.5, 0.5)
# Of a message's parts, the pictures first and then the text.
PARTS = (
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
)


@dataclass(frozen=True)
class Variant:
    """A language model with the prompt that the released checkpoint of it takes."""

    config: type
    template: str
    specials: tuple[str, ...]
    before: str  # the whole prompt up to the picture, and behind it with the text "What is it?"
    after: str
    begin: bool = True  # whether the tokenizer puts <s> in front
    of_text: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "mistral": Variant(
        config=MistralConfig,
        template="{% for m in messages %}[INST] " + PARTS + " [/INST]{% endfor %}",
        specials=("<image>",),
        before="<s>[INST] ",
        after="\nWhat is it? [/INST]",
        of_text={"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    ),
    "llama3": Variant(
        config=LlamaConfig,
        template=(
            "<|start_header_id|>system<|end_header_id|>\n\nYou see and speak.<|eot_id|>{% for m in messages %}"
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n" + PARTS + "<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"),
        before=(
            "<s><|start_header_id|>system<|end_header_id|>\n\nYou see and speak.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n"
        ),
        after="\nWhat is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        of_text={"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "qwen": Variant(
        config=Qwen2Config,
        template=(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}"
            "<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        specials=("<|im_start|>", "<|im_end|>", "<image>"),
        before="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        after="\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        begin=False,
    ),
    "yi": Variant(
        config=LlamaConfig,
        template=(
            "<|im_start|>system\nAnswer the questions.<|im_end|>{% for m in messages %}<|im_start|>{{ m.role }}\n"
            + PARTS
            + "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        specials=("<|im_start|>", "<|im_end|>", "<image>"),
        before="<s><|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
        after="\nWhat is it?<|im_end|><|im_start|>assistant\n",
        of_text={
            "num_attention_heads": 4,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
        },
    ),
}


def make(folder: Path, name: str, **of_config: Any) -> Path:
    variant = VARIANTS[name]
    tokenizer = save_tokenizer(folder, variant.specials, variant.template, begin=variant.begin)
    # The released models have more rows of embeddings than their tokenizers have tokens.
    text = variant.config(**{**TEXT, **variant.of_text, "vocab_size": len(tokenizer) + 13})
    return save_llava_next(folder, tokenizer, text, **of_config)


@pytest.fixture(scope="module", params=VARIANTS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp(name), name)


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(folder)


def load(folder: Path) -> Model:
    processor = LlavaNextImageProcessorPil.from_pretrained(folder)

    def inputs(sizes):
        return dict(processor([parity.picture(size) for size in sizes], return_tensors="pt"))

    return parity.load(folder, inputs, parity.tokens_of_each_picture)


def test_the_prompt_is_that_of_the_released_checkpoint(name, model):
    before, after = model.decoder.encode_prompt("What is it?")
    decode = model.decoder.tokenizer.decode
    assert (decode(before), decode(after)) == (VARIANTS[name].before, VARIANTS[name].after)
    assert before.count(1) == VARIANTS[name].begin, "one BOS token or none"


def test_several_pictures_stand_before_the_text_one_a_line(name, model):
    before, between, after = model.decoder.encode_prompt("What is it?", num_images=2)
    decode = model.decoder.tokenizer.decode
    assert (decode(before), decode(between), decode(after)) == (VARIANTS[name].before, "\n", VARIANTS[name].after)


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    parity.assert_whole_answers(model, PROMPTS)


def test_half_of_the_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    parity.assert_pruned_answers(model, PROMPTS, *parity.pruned(model, PROMPTS, HALVES))


def test_released_names_of_weights_give_the_same_answers(name, folder, model, tmp_path):
    weights = {released_name(key): weight.contiguous() for key, weight in model.whole.state_dict().items()}
    assert {"image_newline", "language_model.model.norm.weight", "language_model.lm_head.weight"} < set(weights)
    other = copied(folder, tmp_path)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    found = load(other)
    parity.assert_pruned_answers(found, PROMPTS[:2], *parity.pruned(found, PROMPTS[:2], HALVES[:2]))


# What is the same for all language models, with one of them


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("one"), "mistral")


@pytest.mark.parametrize("of_config", [{"multimodal_projector_bias": False}, {"vision_feature_layer": [1, -2]}])
def test_checkpoints_of_other_settings_answer_as_transformers(of_config, tmp_path):
    made = make(tmp_path, "mistral", **of_config)
    parity.assert_whole_answers(load(made), PROMPTS[:2])


def test_the_released_keys_of_the_configuration_are_read(mistral, tmp_path):
    """They hold keys that transformers no longer knows, and image_token_index or its newer name."""
    config = json.loads((mistral / "config.json").read_text())
    token = config.pop("image_token_index", None) or config.pop("image_token_id")
    copied(mistral, tmp_path)
    released = {**config, "use_image_newline_parameter": True, "ignore_index": -100, "vocab_size": 32064}
    for key in ("image_token_index", "image_token_id"):
        (tmp_path / "config.json").write_text(json.dumps({**released, key: token}))
        found = read_checkpoint(str(tmp_path))
        assert (found.image_token, found.language_type) == (token, "mistral")


def test_a_checkpoint_without_the_newline_token_is_refused(mistral, tmp_path):
    other = copied(mistral, tmp_path, use_image_newline_parameter=False)
    weights = {key: w for key, w in load_file(mistral / "model.safetensors").items() if "newline" not in key}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="must hold the weight image_newline, found none in"):
        load_encoder(other, **CPU)


def test_an_image_token_that_the_tokenizer_lacks_is_refused(mistral, tmp_path):
    prompter = load_prompter(copied(mistral, tmp_path, image_token_index=32000, image_token_id=32000))
    with pytest.raises(ValueError, match=r"the tokenizer must hold the image token 32000 of config\.json, found none"):
        prompter.encode_prompt("What is it?")


def test_a_class_token_among_the_tokens_of_a_tile_is_refused(mistral, tmp_path):
    other = copied(mistral, tmp_path, vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy must be 'default', so that the tokens"):
        read_checkpoint(str(other))


def test_resolutions_of_parts_of_tiles_are_refused(mistral, tmp_path):
    other = copied(mistral, tmp_path, image_grid_pinpoints=[[56, 112], [56, 100]])
    with pytest.raises(CheckpointError, match=r"must be sizes in whole tiles of 56 x 56 pixels, got \[\(56, 112\)"):
        read_checkpoint(str(other))


def test_methods_of_fixed_numbers_of_tokens_are_refused_by_the_familys_name(mistral):
    checkpoint = read_checkpoint(str(mistral))
    reason = checkpoint.record.refuses(get_method("fastv"), checkpoint)
    assert reason == "method fastv takes images of one size alone, so it cannot prune LLaVA-1.6"
