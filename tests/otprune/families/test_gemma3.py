"""Gemma 3 in two halves against transformers' whole model: pixels, prompts and answers; and what is refused.

A pruned prompt is compared with the whole one, in which nobody sees the pruned tokens and they take no positions. The
mask of that reference is written here row by row, and is another in each kind of layer.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from otprune.flops import projector_flops, vision_flops
from otprune.models import CheckpointError, Prompt, load_decoder, load_encoder, read_checkpoint
from otprune.models.gemma3 import masks
from tests.otprune.families import parity
from tests.otprune.families.parity import CPU, NEAR, NEW_TOKENS, Model, Size, answer, assert_same, some
from tests.tiny import make_gemma3

LANDSCAPE, PORTRAIT, SQUARE, LINE = (150, 260), (310, 130), (56, 56), (20, 900)  # height, width
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SQUARE]), ("compare the two", [PORTRAIT, LINE]))
SHARES = (0.5, 0.75, 0.8)
WINDOW = 12  # shorter than a whole picture


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = make_gemma3(tmp_path_factory.mktemp("gemma3"), window=WINDOW)
    processor = Gemma3ImageProcessorPil.from_pretrained(folder)

    def inputs(sizes: Sequence[Size]) -> dict[str, Tensor]:
        made = processor([parity.picture(size) for size in sizes], return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}

    return parity.load(folder, inputs, parity.tokens_of_each_picture)


def expected_rows(model: Model, sizes: Sequence[Size]) -> list[Tensor]:
    """The tokens of each picture by the whole model."""
    return list(model.features(sizes).pooler_output)


def visual(model: Model, shares: Sequence[float]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """(indices, rows) of a random part of each picture of each prompt."""
    kept = [[some(16, share) for _ in sizes] for share, (_, sizes) in zip(shares, PROMPTS, strict=True)]
    rows = [
        [tokens[index] for tokens, index in zip(model.rows(sizes), indices, strict=True)]
        for indices, (_, sizes) in zip(kept, PROMPTS, strict=True)
    ]
    return kept, rows


def encoded(model: Model) -> list[Prompt]:
    return [model.decoder.encode_prompt(text, num_images=len(sizes)) for text, sizes in PROMPTS]


@torch.inference_mode()
def definition(model: Model, prompt: Prompt, sizes: Sequence[Size], kept: Sequence[Tensor]) -> Tensor:
    """Logits [NEW_TOKENS, V] of the whole prompt in which only `kept` of each picture's tokens are there."""
    inner, ids, features = model.whole.model, model.ids(prompt, sizes)[0].tolist(), expected_rows(model, sizes)
    picture_of, number = [], 0
    for i, token in enumerate(ids):
        is_image = token == model.checkpoint.image_token
        number += is_image and ids[i - 1] != token
        picture_of.append(number if is_image else 0)
    places = [i for i, number in enumerate(picture_of) if number]
    visible = [number == 0 for number in picture_of]
    for i, index in enumerate(kept):
        for token in index.tolist():
            visible[places[16 * i + token]] = True
    embeds = inner.get_input_embeddings()(torch.tensor([ids]))
    embeds[0, places] = torch.cat(features)
    window, logits = model.whole.config.text_config.sliding_window, []
    for _ in range(NEW_TOKENS):  # anew for each word, without a cache
        position = (torch.tensor(visible).cumsum(0) - 1).tolist()
        full = torch.eye(len(visible), dtype=torch.bool)
        near = full.clone()
        for i in range(len(visible)):
            for j in range(len(visible)):
                if visible[j] and (j <= i or picture_of[i] == picture_of[j] > 0):
                    full[i, j] = True
                    near[i, j] = position[i] - position[j] < window
        hidden = inner.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": full[None, None], "sliding_attention": near[None, None]},
            position_ids=torch.tensor([position]).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        logits.append(model.whole.lm_head(hidden[0, -1]))
        word = inner.get_input_embeddings()(logits[-1].argmax().view(1, 1))
        embeds = torch.cat([embeds, word], dim=1)
        visible.append(True)
        picture_of.append(0)
    return torch.stack(logits)


# The tower


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, LINE, (20, 20), (112, 112)])
def test_pixels_are_those_of_the_image_processor(model, size):
    mean, std = torch.tensor(model.checkpoint.mean), torch.tensor(model.checkpoint.std)
    found = ((model.frame(size).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(found, model.inputs([size])["pixel_values"], atol=1e-5, rtol=0)


def test_tokens_are_those_of_the_whole_model(model):
    sizes = [LANDSCAPE, PORTRAIT, SQUARE]
    for found, expected in zip(model.rows(sizes), expected_rows(model, sizes), strict=True):
        torch.testing.assert_close(found, expected, atol=NEAR, rtol=0)
        assert len(found) == model.checkpoint.geometry.num_visual(LANDSCAPE) == 16
        assert found.shape[1] == model.checkpoint.row_width == model.encoder.row_width


def test_multiply_adds_are_those_that_run(model):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.rows([SQUARE])
    shape = model.checkpoint.shape
    assert counter.get_total_flops() == 2 * (vision_flops(shape.vision) + projector_flops(shape))


# Prompts


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("num_images", [1, 2])
def test_a_prompt_is_the_one_that_transformers_processor_makes(model, num_images, system):
    """The processor puts blank lines, a start and an end around a picture; the template writes the start alone."""
    tokenizer, parts = model.decoder.tokenizer, [{"type": "image"}] * num_images + [{"type": "text", "text": "what?"}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    rendered = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    whole = f"\n\n{names['boi_token']}{names['image_token'] * 16}{names['eoi_token']}\n\n"
    processor: Any = SimpleNamespace(full_image_sequence=whole)
    picture = Gemma3Processor.replace_image_token(processor, {"num_crops": [0]}, 0)
    expected = tokenizer(rendered.replace("<start_of_image>", picture)).input_ids[1:]  # the template wrote <s> too
    prompt = model.decoder.encode_prompt("what?", num_images=num_images, system=system)
    assert model.ids(prompt, [SQUARE] * num_images)[0].tolist() == expected
    assert expected.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("conversation", ["plain", "vicuna_v1"])
def test_without_a_template_a_picture_stands_between_its_start_and_end_too(model, conversation):
    before, between, after = model.decoder.encode_prompt("what?", conversation, num_images=2)
    start, end = model.decoder.tokenizer.convert_tokens_to_ids(["<start_of_image>", "<end_of_image>"])
    assert (before[-1], between[0], between[-1], after[0]) == (start, end, start, end)


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    found = answer(model, visual(model, (1, 1, 1))[1], encoded(model))
    for logits, prompt, (_, sizes) in zip(found, encoded(model), PROMPTS, strict=True):
        ids = model.ids(prompt, sizes)
        expected = model.whole.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=(ids == model.checkpoint.image_token).long(),
            **model.inputs(sizes),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert_same(logits, torch.cat(expected.logits))


def test_kept_tokens_give_the_answers_of_the_whole_prompt_without_the_others(model):
    kept, rows = visual(model, SHARES)
    found = answer(model, rows, encoded(model))
    assert len({sum(map(len, pictures)) for pictures in rows}) == len(PROMPTS), "the batch is to be ragged"
    for logits, prompt, (_, sizes), indices in zip(found, encoded(model), PROMPTS, kept, strict=True):
        assert_same(logits, definition(model, prompt, sizes, indices))
        assert len(set(logits.argmax(-1).tolist())) > 2, "a model that repeats one word would prove little"


@pytest.mark.parametrize("wrong", ["causal", "all pictures as one"])
def test_with_another_mask_the_answers_are_others(model, wrong):
    rows, prompts = visual(model, SHARES)[1], encoded(model)
    expected = answer(model, rows, prompts)
    change = {"causal": lambda pictures: pictures * 0, "all pictures as one": lambda pictures: pictures.clamp_max(1)}

    def spoil(module, args, kwargs):
        if "pictures" in kwargs:
            return args, {**kwargs, "pictures": change[wrong](kwargs["pictures"])}
        return None

    hook = model.decoder.model.register_forward_pre_hook(spoil, with_kwargs=True)
    try:
        far = (answer(model, rows, prompts) - expected)[:, 0].abs().amax(dim=-1)
    finally:
        hook.remove()
    assert far[2] > 10 * NEAR
    assert ((far[:2] > 10 * NEAR) if wrong == "causal" else (far[:2] == 0)).all(), far  # they have one picture each


def test_the_masks_of_a_padded_prompt_row_by_row():
    pictures = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 0]])
    found = masks(pictures, torch.tensor([[False] + [True] * 7]), window=2)
    rows = {name: ["".join("x" if seen else "." for seen in row) for row in mask[0, 0]] for name, mask in found.items()}
    assert rows["full_attention"] == [
        *("x.......", ".xxx....", ".xxx....", ".xxx....", ".xxxx...", ".xxxxxx.", ".xxxxxx.", ".xxxxxxx")
    ]
    assert rows["sliding_attention"] == [
        *("x.......", ".xxx....", ".xxx....", "..xx....", "...xx...", "....xxx.", ".....xx.", "......xx")
    ]


# Checkpoints


def configure(folder: Path, name: str, section: str | None, **keys: Any) -> None:
    stored = json.loads((folder / name).read_text())
    (stored if section is None else stored[section]).update(keys)
    (folder / name).write_text(json.dumps(stored))


@pytest.mark.parametrize("tie", [True, False])
def test_both_layouts_of_names_load(tie, tmp_path):
    """The tower's released names, and the language model's in transformers 5's class; no head where it is tied."""
    folder = make_gemma3(tmp_path, tie=tie)
    file = folder / "model.safetensors"
    weights = load_file(file)
    expected = load_decoder(read_checkpoint(str(folder)), **CPU).model.causal.state_dict()
    tower = load_encoder(read_checkpoint(str(folder)), **CPU).state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    assert any(name.startswith("language_model.model.layers") for name in weights)
    assert any(name.startswith("vision_tower.encoder") for name in weights)
    assert any("lm_head" in name for name in weights) is not tie
    renamed = {
        name.replace("language_model.model.", "model.language_model."): tensor for name, tensor in weights.items()
    }
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in renamed.items()}
    renamed = {name.replace("language_model.lm_head", "lm_head"): tensor for name, tensor in renamed.items()}
    save_file(renamed, file, {"format": "pt"})
    found = load_decoder(read_checkpoint(str(folder)), **CPU).model.causal.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = load_encoder(read_checkpoint(str(folder)), **CPU).state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(again[name], tensor) for name, tensor in tower.items())


@pytest.mark.parametrize(
    ("file", "section", "keys", "says"),
    [
        ("preprocessor_config.json", None, {"do_pan_and_scan": True}, "do_pan_and_scan must be false or null"),
        ("preprocessor_config.json", None, {"size": {"height": 84, "width": 84}}, "must be the tower's 56 x 56"),
        (
            "config.json",
            "text_config",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be fal",
        ),
        ("config.json", None, {"mm_tokens_per_image": 9}, "whose side divides the 8 patches of a row, got 9"),
        ("config.json", None, {"boi_token_index": 3000}, "the tokenizer's ids must be the configuration's"),
        ("config.json", None, {"image_token_index": 3000}, "image_token_index must be below the"),
        ("config.json", None, {"model_type": "gemma3_text"}, "must be a checkpoint of the families"),
    ],
)
def test_what_does_not_run_is_one_line(file, section, keys, says, model, tmp_path):
    folder = shutil.copytree(model.checkpoint.path, tmp_path / "model")
    configure(folder, file, section, **keys)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
