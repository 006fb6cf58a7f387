"""The demo world says only what is true, and never shows training what it is judged on."""

import hashlib
import json
import random
import re

import numpy as np
import pytest

from demo.labels import KIND, NOTHING, patch_labels, patch_masks
from demo.language import NUMBERS, TASKS, caption, position_words, question, questions, references, words
from demo.render import render
from demo.world import COLORS, KINDS, SIDE, SPLITS, Scene, Shape, sample_scene, scene_at

SCENES = [scene_at("corpus", index) for index in range(120)]
PHRASE = re.compile(r"a (small|large) (\w+) (circle|square|triangle|star|cross|ring|diamond|heart)")


def test_the_same_seed_gives_the_same_scene_and_pixels():
    assert scene_at("corpus", 7) == scene_at("corpus", 7)
    assert scene_at("corpus", 7) != scene_at("corpus", 8)
    np.testing.assert_array_equal(render(scene_at("corpus", 7)).pixels, render(scene_at("corpus", 7)).pixels)


def test_the_sampler_still_draws_the_scenes_and_questions_the_shipped_checkpoint_was_trained_on():
    rng, question_rng, digest = random.Random(0), random.Random(1), hashlib.sha256()
    for _ in range(200):
        scene = sample_scene(rng)
        asked = [question(scene, task, question_rng) for task in TASKS]
        digest.update(json.dumps([scene.to_dict(), caption(scene), asked]).encode())
    assert digest.hexdigest() == "97e1e0d2d39188c664f63d6733fba5f9ba8e5d284ff572631a4da30173a5314c"


def test_splits_share_no_scene():
    drawn = {split: {scene_at(split, index) for index in range(500)} for split in SPLITS}
    assert not drawn["train"] & drawn["corpus"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["validation"] & drawn["corpus"]


@pytest.mark.parametrize(("split", "index", "message"), [("test", 0, "split must be"), ("train", -1, "index must be")])
def test_unknown_splits_and_indices_are_refused(split, index, message):
    with pytest.raises(ValueError, match=message):
        scene_at(split, index)


def test_a_scene_survives_json():
    assert [Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) for scene in SCENES] == SCENES


def test_shapes_lie_apart_inside_the_image_and_no_two_look_alike():
    for scene in SCENES:
        assert 1 <= len(scene.shapes) <= 5
        assert len({(shape.color, shape.kind) for shape in scene.shapes}) == len(scene.shapes)
        for number, item in enumerate(scene.items):
            assert item.radius < min(item.x, item.y)
            assert max(item.x, item.y) < SIDE - item.radius
            for other in scene.items[:number]:
                assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


def test_a_filled_shape_has_its_colour_at_its_centre():
    for scene in SCENES:
        pixels = render(scene).pixels.astype(int)
        for shape in scene.shapes:
            if shape.kind != "ring":
                seen = pixels[round(shape.y) - 2 : round(shape.y) + 3, round(shape.x) - 2 : round(shape.x) + 3].mean(
                    (0, 1)
                )
                nearest = min(COLORS, key=lambda name: np.abs(seen - COLORS[name]).sum())
                assert nearest == shape.color


def test_every_item_owns_a_patch_and_masks_average_to_its_cover():
    for scene in SCENES[:40]:
        alpha = render(scene).alpha
        kinds = patch_labels(scene, alpha)[:, KIND]
        named = {shape.kind for shape in scene.shapes} | ({scene.digit.value} if scene.digit else set())
        names = [*KINDS, *(str(digit) for digit in range(10))]
        assert {names[kind] for kind in kinds if 0 <= kind < NOTHING} == named
        cover = alpha.max(0).reshape(16, 14, 16, 14).mean((1, 3)).ravel()
        np.testing.assert_allclose(patch_masks(alpha).mean(1), cover, atol=1e-6)


def test_every_scene_has_four_distinct_references_that_name_exactly_its_shapes():
    for scene in SCENES:
        told = references(scene)
        assert len(set(told)) == 4
        assert told[0] == caption(scene)
        truth = sorted((shape.size, shape.color, shape.kind) for shape in scene.shapes)
        for reference in told:
            assert sorted(PHRASE.findall(reference)) == truth
            assert f"on a {scene.background} background" in reference
        assert told[1].startswith(NUMBERS[len(truth)])
        if "left of" in told[3]:
            assert all(scene.shapes[0].x < other.x for other in scene.shapes[1:])


def test_everything_said_is_in_the_vocabulary():
    vocabulary, rng = set(words()), random.Random(0)
    for scene in SCENES:
        said = references(scene) + [text for asked in questions(scene, rng) for text in asked.values()]
        assert set(" ".join(said).split()) <= vocabulary | set(TASKS)


def test_answers_follow_from_the_scene():
    """An oracle for each task, from the question's words alone."""
    rng, seen = random.Random(3), set()
    for scene in SCENES:
        for _ in range(4):
            for asked in questions(scene, rng):
                assert asked["answer"] == _oracle(scene, asked["question"]), asked
                seen.add(asked["task"])
    assert seen == set(TASKS)


def _oracle(scene: Scene, text: str) -> str:
    text, *options = re.split(r" (?=[A-D] )", text)
    if options:
        told = _oracle(scene, text)
        return next(option[0] for option in options if option[2:] == told)
    if text == "what digit is written ?":
        return scene.digit.value
    if text == "what color is the background ?":
        return scene.background
    if match := re.fullmatch(r"how many (?:(\w+) )?shapes are there \?", text):
        return NUMBERS[sum(match[1] in (None, shape.size) for shape in scene.shapes)]
    if match := re.fullmatch(r"is there a (\w+) (\w+) \?", text):
        return "yes" if any((shape.color, shape.kind) == match.groups() for shape in scene.shapes) else "no"
    if match := re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+) \?", text):
        a, b = _find(scene, match[1], match[2]), _find(scene, match[4], match[5])
        holds = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[match[3]]
        return "yes" if holds else "no"
    if match := re.fullmatch(r"where is the (\w+) (\w+) \?", text):
        shape = _find(scene, match[1], match[2])
        return " ".join(position_words(shape.x, shape.y))
    if match := re.fullmatch(r"what size is the (\w+) (\w+) \?", text):
        return _find(scene, match[1], match[2]).size
    if match := re.fullmatch(r"what color is the (\w+) \?", text):
        return next(shape.color for shape in scene.shapes if shape.kind == match[1])
    match = re.fullmatch(r"what shape is (\w+) \?", text)
    return next(shape.kind for shape in scene.shapes if shape.color == match[1])


def _find(scene: Scene, color: str, kind: str) -> Shape:
    return next(shape for shape in scene.shapes if (shape.color, shape.kind) == (color, kind))
