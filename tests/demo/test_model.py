"""The shipped checkpoint: it loads, captions held-out scenes, and is scored as greedy decoding would score it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from demo.evaluate import evaluate
from demo.language import CAPTION_PROMPT, caption, words
from demo.model import build_model, build_processor, build_tokenizer, encode_patches, to_pixels
from demo.packing import NO_TARGET, answer_logits, pack, prefix_ids
from demo.render import render
from demo.train_language import ask, scene_features
from demo.world import GRID, scene_at

CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
SCENES = [scene_at("corpus", index) for index in range(16)]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def captions(model, processor):
    """Greedy captions of held-out scenes through the ordinary transformers path."""
    prompt = f"USER: <image>\n{CAPTION_PROMPT} ASSISTANT:"
    images = [Image.fromarray(render(scene).pixels) for scene in SCENES]
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_most_held_out_scenes_are_captioned_word_for_word(captions):
    assert sum(told == caption(scene) for told, scene in zip(captions, SCENES, strict=True)) > len(SCENES) / 2


@pytest.mark.slow
def test_teacher_forced_exact_match_is_greedy_exact_match(model, processor, captions):
    greedy = np.mean([told == caption(scene) for told, scene in zip(captions, SCENES, strict=True)])
    assert evaluate(model, processor.tokenizer, SCENES)["caption"] == greedy


@pytest.mark.slow
def test_questions_that_name_a_shape_are_answered_and_losing_all_but_one_token_is_felt(model, processor):
    scenes = [scene_at("corpus", index) for index in range(24)]
    full = evaluate(model, processor.tokenizer, scenes)
    starved = evaluate(model, processor.tokenizer, scenes, select=lambda visual: torch.zeros(len(visual), 1).long())
    assert full["exist"] > 0.9
    assert full["attr"] > 0.9
    assert starved["attr"] < 0.6
    assert starved["caption"] == 0


def test_a_packed_question_gets_the_logits_it_gets_alone(model, processor):
    tokenizer, prefix = processor.tokenizer, prefix_ids(processor.tokenizer)
    asked = [ask(scene, random.Random(0)) for scene in SCENES[:2]]
    with torch.inference_mode():
        features = scene_features(model, np.stack([render(scene).pixels for scene in SCENES[:2]]))
        visual = model.model.multi_modal_projector(features)
        together, _ = answer_logits(model, prefix, visual, pack(asked, tokenizer, visual.shape[1]))
        alone = [
            answer_logits(model, prefix, visual[row : row + 1], pack([[question]], tokenizer, visual.shape[1]))[0]
            for row in range(2)
            for question in asked[row]
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)  # float32 sums in another order


def test_packing_marks_exactly_the_answers_and_their_stop_tokens_as_targets(processor):
    asked = ask(SCENES[0], random.Random(0))
    targets = pack([asked], processor.tokenizer, GRID**2).targets
    told = processor.tokenizer.decode(targets[targets != NO_TARGET])
    assert told == " ".join(f"{answer} </s>" for _, _, answer in asked)


def test_tensor_names_are_those_of_the_released_checkpoints():
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6


def test_our_recipe_builds_the_very_architecture_and_processor_of_the_checkpoint(processor):
    tokenizer = build_tokenizer()
    built = build_model(tokenizer).config.to_dict()
    for part in ("text_config", "vision_config"):
        shipped = json.loads((CHECKPOINT / "config.json").read_text())[part]
        assert {key: built[part][key] for key in shipped if key != "dtype"} == {
            key: value for key, value in shipped.items() if key != "dtype"
        }
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    text = f"USER: <image>\n{CAPTION_PROMPT} ASSISTANT:"
    image = Image.fromarray(render(SCENES[0]).pixels)
    ours, theirs = (p(images=image, text=text, return_tensors="pt") for p in (build_processor(tokenizer), processor))
    torch.testing.assert_close(ours.input_ids, theirs.input_ids, atol=0, rtol=0)
    torch.testing.assert_close(ours.pixel_values, theirs.pixel_values, atol=0, rtol=0)
    assert (ours.input_ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == GRID**2


def test_every_word_is_one_token(processor):
    for word in words():
        assert len(processor.tokenizer(word, add_special_tokens=False).input_ids) == 1


def test_our_walk_through_the_tower_is_the_tower_and_a_window_keeps_its_place(model):
    pixels = to_pixels(render(SCENES[0]).pixels[None])
    tower, places = model.model.vision_tower, torch.arange(GRID**2)[None]
    with torch.inference_mode():
        theirs = tower(pixels, output_hidden_states=True)
        _, features, scene_token = encode_patches(tower, pixels, places, whole=True)
        _, window, none = encode_patches(tower, pixels, places, whole=False)
    torch.testing.assert_close(features, theirs.hidden_states[-2][:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scene_token, theirs.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(window, features, atol=0, rtol=0)
    assert none is None
