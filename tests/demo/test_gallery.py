"""The second demo: its scenes are held out and truly described, and training sees what transformers sees."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from demo.gallery import labels as lab
from demo.gallery.language import (
    LONG_PROMPT,
    long_caption,
    long_references,
    neighbour,
    place_of,
    questions,
    short_caption,
    words,
)
from demo.gallery.model import build_image_processor, build_model, build_tokenizer, encode, to_patches
from demo.gallery.packing import answer_logits, pack, prefix_ids
from demo.gallery.render import render
from demo.gallery.train_language import ask
from demo.gallery.world import CELL, MAX_THINGS, SIZES, Scene, scene_at


@pytest.fixture(scope="module")
def scenes():
    return [scene_at("validation", number) for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer).eval()


def test_scenes_are_the_same_every_time_of_many_sizes_and_hold_one_to_fourteen_things(scenes):
    assert scene_at("validation", 3) == scenes[3] != scene_at("corpus", 3)
    assert Scene.from_dict(scenes[3].to_dict()) == scenes[3]
    assert {(scene.columns, scene.rows) for scene in scenes} == set(SIZES)
    assert {len(scene.things) for scene in scenes} == set(range(1, MAX_THINGS + 1))


def test_things_lie_inside_and_apart(scenes):
    for scene in scenes:
        for thing in scene.shapes:
            assert thing.radius <= thing.x <= scene.width - thing.radius
            assert thing.radius <= thing.y <= scene.height - thing.radius
        for a in scene.things:
            for b in scene.things:
                assert a is b or np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_a_long_caption_tells_every_thing_once_at_its_place_in_words_that_the_tokenizer_knows(scenes):
    known = set(words())
    for scene in scenes:
        text = long_caption(scene)
        assert 55 <= sum(word.isalpha() for word in text.split()) <= 150
        for thing in scene.things:
            assert text.count(thing.phrase) == 1
            before = text[: text.index(thing.phrase)]
            assert before.rpartition("at the ")[2].startswith(" ".join(place_of(thing, scene)))
        asked = questions(scene, random.Random(0))
        texts = [*long_references(scene), short_caption(scene), *(q["question"] + " " + q["answer"] for q in asked)]
        assert {word for text in texts for word in text.split()} <= known


def test_a_neighbour_is_the_nearest_other_thing(scenes):
    scene = next(scene for scene in scenes if len(scene.things) == 5)
    for thing in scene.things:
        other = neighbour(thing, scene)
        distance = min(np.hypot(t.x - thing.x, t.y - thing.y) for t in scene.things if t is not thing)
        assert np.hypot(other.x - thing.x, other.y - thing.y) == distance
    alone = next(scene for scene in scenes if len(scene.things) == 1)
    assert neighbour(alone.things[0], alone) is None
    assert "near" not in long_caption(alone)


def test_the_cells_of_a_thing_have_its_labels_and_the_patches_its_opacity(scenes):
    scene = next(scene for scene in scenes if scene.sign and len(scene.shapes) > 2)
    drawing = render(scene)
    marks = lab.cell_labels(scene, drawing.alpha).reshape(scene.rows, scene.columns, -1)
    for thing, alpha in zip(scene.things, drawing.alpha, strict=True):
        row, column = np.unravel_index(
            alpha.reshape(scene.rows, CELL, scene.columns, CELL).mean((1, 3)).argmax(), marks.shape[:2]
        )
        kind = getattr(thing, "kind", None) or thing.word
        assert lab.KIND_WORDS[marks[row, column, lab.KIND]] == kind
    masks = lab.patch_masks(drawing.alpha)
    assert masks.shape == (4 * scene.rows * scene.columns, 49)
    assert masks.mean() == pytest.approx(drawing.alpha.max(0).mean(), rel=1e-5)


def test_training_gives_the_tower_what_the_image_processor_gives_it(scenes):
    pixels = render(scenes[0]).pixels
    processed = build_image_processor()(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert processed["image_grid_thw"].tolist() == [[1, 2 * scenes[0].rows, 2 * scenes[0].columns]]
    torch.testing.assert_close(to_patches(pixels[None]), processed["pixel_values"], atol=1e-6, rtol=0)


@torch.inference_mode()
def test_a_packed_answer_has_the_logits_of_transformers_own_forward_pass(scenes, model, tokenizer):
    """Prompt, positions, picture and mask at once: what training optimises is what generation computes."""
    scene = next(scene for scene in scenes if scene.columns != scene.rows)
    pixels = render(scene).pixels
    visual, _ = encode(model, pixels[None])
    asked = ask(scene, random.Random(1))
    kept = torch.arange(visual.shape[1])[None]
    packed = pack([asked], tokenizer, kept, scene.columns, scene.rows)
    logits, is_target = answer_logits(model, prefix_ids(tokenizer), visual, packed)
    content = [{"type": "image"}, {"type": "text", "text": LONG_PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    text = text.replace("<|image_pad|>", "<|image_pad|>" * visual.shape[1]) + asked[0].answer
    ids = torch.tensor([tokenizer(text).input_ids])
    processed = build_image_processor()(images=[Image.fromarray(pixels)], return_tensors="pt")
    is_picture = (ids == model.config.image_token_id).int()
    whole = model(input_ids=ids, mm_token_type_ids=is_picture, **processed).logits[0]
    mine = logits[(packed.segment == 1)[is_target]]
    torch.testing.assert_close(mine, whole[-len(mine) :], atol=2e-4, rtol=1e-4)
