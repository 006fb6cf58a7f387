"""Objects in captions: CHAIR beside captions that were read by hand, and what is said of drawn shapes."""

import json

import numpy as np
import pytest

from demo.gallery.language import long_caption, long_references
from demo.gallery.world import scene_at as gallery_scene_at
from demo.language import caption, references
from demo.world import COLORS, KINDS, RADII, SIDE, scene_at
from pipelines.metrics import chair
from pipelines.metrics import shapes as drawn
from pipelines.metrics.chair import chair_counts, chair_metrics, mentions, split
from pipelines.metrics.coco_objects import COCO, WORDS, objects_of_images, read_instances
from pipelines.metrics.shapes import Drawn, shape_counts, shape_metrics, shapes_of_caption, shapes_of_scene


def names(text: str) -> list[str]:
    return text.split(", ") if text else []


# caption, objects there, mentions and inventions as a reader counts them
READ = [
    ("A man rides a horse on the beach.", "person, horse", "person, horse", ""),
    ("Two dogs and a cat sleep by a teddy bear.", "dog, couch, bear", "dog, cat, teddy bear", "cat, teddy bear"),
    ("An orange cat sits on an orange sofa.", "cat, couch", "cat, couch", ""),
    ("Oranges, an orange and apples in a bowl.", "orange, bowl", "orange, orange, apple, bowl", "apple"),
    ("Train tracks run past a parking lot; no train is to be seen.", "car", "train", "train"),
    ("A boy's knives and wine glasses.", "person, knife, fork", "person, knife, wine glass", "wine glass"),
    ("A hot dog, a hot-dog and a dog.", "hot dog", "hot dog, hot dog, dog", "dog"),
    ("", "clock", "", ""),
    ("The clock tower has two clocks and a bird on it.", "clock", "clock, clock, bird", "bird"),
    ("A bus stop with children, women and buses.", "person, bus", "person, person, bus", ""),
]
BY_HAND = [(text, set(names(there)), names(said), names(invented)) for text, there, said, invented in READ]


@pytest.mark.parametrize(("text", "there", "mentioned", "invented"), BY_HAND)
def test_chair_is_what_a_reader_counts(text, there, mentioned, invented):
    said = chair(text, there, COCO)
    assert (said.mentioned, said.invented) == (mentioned, invented)
    assert said.recall == len(there & set(mentioned)) / len(there)


def test_chair_of_a_corpus_is_the_ratio_of_the_sums():
    sums = np.sum([chair_counts(text, there, COCO) for text, there, _, _ in BY_HAND], axis=0)
    said, invented = (sum(len(row[i]) for row in BY_HAND) for i in (2, 3))
    found, objects = sum(len(t & set(m)) for _, t, m, _ in BY_HAND), sum(len(t) for _, t, _, _ in BY_HAND)
    metrics = chair_metrics(sums)
    assert metrics["chair_i"] == invented / said
    assert metrics["chair_s"] == sum(bool(row[3]) for row in BY_HAND) / len(BY_HAND)
    assert metrics["object_recall"] == found / objects
    precision = 1 - invented / said
    assert metrics["object_f1"] == pytest.approx(2 / (1 / precision + objects / found))


def test_a_vocabulary_may_be_a_mapping_or_names_and_an_image_without_objects_is_recalled():
    assert chair("a doggy and a cat", ["dog"], {"dog": ["doggy"], "cat": []}) == (["dog", "cat"], ["cat"], 1.0)
    assert chair("a doggy and cats", ["dog"], ["dog", "cat"]) == (["cat"], ["cat"], 0.0)
    assert chair("nothing", [], ["dog"]) == ([], [], 1.0)


def test_every_object_of_coco_is_named_by_its_words_and_their_plurals():
    assert len(WORDS) == 80
    for name, words in WORDS.items():
        for word in filter(None, [name, *(each.strip() for each in words.split(","))]):
            assert chair(f"a {word}.", [name], COCO).mentioned == [name], word
            if not word.endswith("s"):
                assert chair(f"two {word}s.", [name], COCO).mentioned == [name], word


def test_the_objects_of_images_come_from_an_instances_file():
    content = {
        "images": [{"id": 7}, {"id": 9}],
        "categories": [{"id": 1, "name": "person"}, {"id": 17, "name": "cat"}],
        "annotations": [{"image_id": 7, "category_id": c} for c in (1, 17, 1)],
    }
    assert read_instances(json.dumps(content).encode()) == {7: {"person", "cat"}, 9: frozenset()}
    with pytest.raises(ValueError, match="images, annotations and categories"):
        objects_of_images({"images": []})
    with pytest.raises(ValueError, match="got others: unicorn"):
        objects_of_images(content | {"categories": [{"id": 1, "name": "unicorn"}, {"id": 17, "name": "cat"}]})


# Drawn shapes


def test_the_words_are_those_of_the_demo_world():
    assert (list(drawn.KINDS), list(drawn.COLORS), list(drawn.SIZES)) == (KINDS, list(COLORS), list(RADII))
    assert drawn.SIDE == SIDE


def test_true_captions_of_the_demo_world_have_no_fault():
    counts, claims = np.zeros(8), np.zeros(6)
    for i in range(200):
        scene = scene_at("corpus", i)
        there = shapes_of_scene(scene.to_dict())
        for text in references(scene):
            counts += shape_counts(text, there)
            claims += chair_counts(text, {shape.kind for shape in there}, drawn.SHAPES)
    assert set(map(float, shape_metrics(counts).values())) == {1.0}
    assert counts[4] > 50  # relations of two shapes
    metrics = chair_metrics(claims)
    assert (metrics["chair_i"], metrics["chair_s"], metrics["object_recall"]) == (0, 0, 1)


def test_captions_of_another_scene_are_faulty():
    counts = np.zeros(8)
    for i in range(100):
        counts += shape_counts(caption(scene_at("corpus", i + 1)), shapes_of_scene(scene_at("corpus", i).to_dict()))
    metrics = shape_metrics(counts)
    assert metrics["color_accuracy"] < 0.4
    assert metrics["described"] < 0.2


RED = Drawn("circle", "red", "small", 0.1, 0.2)
BLUE = Drawn("circle", "blue", "large", 0.9, 0.5)
STAR = Drawn("star", "white", "small", 0.5, 0.9)


@pytest.mark.parametrize(
    ("text", "colors", "sizes", "places", "described"),
    [
        ("a small red circle and a large blue circle", (2, 2), (2, 2), (0, 0), 2),
        ("a large red circle", (1, 1), (1, 0), (0, 0), 1),
        ("a green circle", (1, 0), (0, 0), (0, 0), 0),
        ("a red ring", (0, 0), (0, 0), (0, 0), 0),  # no ring is there: CHAIR's
        ("a circle", (0, 0), (0, 0), (0, 0), 0),
        ("a red circle at the top left and a star at the top", (1, 1), (0, 0), (2, 1), 1),
        ("a blue circle in the middle right", (1, 1), (0, 0), (1, 1), 1),
        ("a red circle is left of a white star", (2, 2), (0, 0), (1, 1), 2),
        ("the star is above the blue circle , right of it", (1, 1), (0, 0), (1, 0), 1),
        ("two red circles", (1, 1), (0, 0), (0, 0), 1),
        ("at the top left there is a red circle and a star .", (1, 1), (0, 0), (2, 1), 1),
        ("at the top there is a star at the bottom . at the left", (0, 0), (0, 0), (1, 1), 0),  # of its own sentence
        ("at the top left is a red circle near the large blue circle", (2, 2), (1, 1), (1, 1), 2),
    ],
)
def test_what_is_said_of_shapes_is_held_against_the_scene(text, colors, sizes, places, described):
    counts = shape_counts(text, [RED, BLUE, STAR])
    assert [tuple(counts[i : i + 2]) for i in (0, 2, 4)] == [colors, sizes, places]
    assert tuple(counts[6:]) == (3, described)


def test_long_captions_of_the_gallery_are_right_everywhere_and_those_of_another_scene_are_not():
    right, wrong = np.zeros(8), np.zeros(8)
    for i in range(40):
        scene, other = (gallery_scene_at("corpus", number) for number in (i, i + 1))
        there = shapes_of_scene({**scene.to_dict(), "width": scene.width, "height": scene.height})
        for text in long_references(scene):
            right += shape_counts(text, there)
        wrong += shape_counts(long_caption(other), there)
        told = shapes_of_caption(long_caption(scene))
        assert {(shape.color, shape.size, shape.kind) for shape in told} == {
            (shape.color, shape.size, shape.kind) for shape in there
        }
        assert [shape.place for shape in sorted(told, key=str)] == [s.place for s in sorted(there, key=str)]
    assert all(value == 1 for value in shape_metrics(right).values())
    assert all(value < 0.5 for value in shape_metrics(wrong).values())


def test_a_scene_of_another_form_is_refused():
    with pytest.raises(ValueError, match="a scene must hold shapes"):
        shapes_of_scene({"shapes": [{"kind": "circle"}]})


def test_mentions_say_where_they_stand():
    assert mentions(split("a dining table, two cats"), COCO) == [("dining table", 1, 3), ("cat", 5, 6)]
