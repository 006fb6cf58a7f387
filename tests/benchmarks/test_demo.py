"""The demo world's captions are scored by what they get right, beside the papers' scores."""

import pytest

from demo.gallery.corpus import GALLERY
from demo.gallery.language import long_caption, long_references
from demo.gallery.world import scene_at as gallery_scene_at
from demo.language import caption, references
from demo.world import scene_at
from pipelines.benchmarks import Record, get_benchmark, get_benchmarks


def record(i: int, prediction: str | None) -> Record:
    rest = {"category": "", "kind": "caption", "choices": [], "answers": references(scene_at("corpus", i))}
    return Record(question_id=str(i), group_id=str(i), prediction=prediction, **rest)  # pyright: ignore


def test_captions_are_scored_by_what_they_invent_find_and_get_right():
    scenes = range(20)
    right = get_benchmark("demo_caption").score([record(i, caption(scene_at("corpus", i))) for i in scenes])
    assert right.headline == "demo_CIDEr"
    shares = {name: value for name, value in right.metrics.items() if name.startswith("demo_")}
    assert (shares["demo_chair_s"], shares["demo_chair_i"], shares["demo_looping"]) == (0, 0, 0)
    perfect = ("object_recall", "object_f1", "color_accuracy", "size_accuracy", "described")
    assert [shares[f"demo_{name}"] for name in perfect] == [1] * 5
    assert "demo_place_accuracy" not in shares
    assert shares["demo_words"] > 10

    answers = [None, "a small red circle " * 20, *(caption(scene_at("corpus", i + 1)) for i in scenes[2:])]
    wrong = get_benchmark("demo_caption").score([record(i, text) for i, text in zip(scenes, answers, strict=True)])
    assert wrong.metrics["demo_looping"] == pytest.approx(1 / 20)
    assert wrong.metrics["demo_described"] < 0.3
    low, high = wrong.intervals["demo_chair_i"]
    assert low < wrong.metrics["demo_chair_i"] < high


def test_long_captions_of_the_gallery_are_scored_by_the_share_of_described_shapes_and_their_places():
    scenes = [gallery_scene_at("corpus", i) for i in range(20)]

    def long_record(i: int, prediction: str) -> Record:
        return Record(**{**record(i, prediction), "answers": long_references(scenes[i])})

    bench = get_benchmark("gallery_long")
    right = bench.score([long_record(i, long_caption(scene)) for i, scene in enumerate(scenes)])
    assert right.headline == "gallery_described"
    assert (
        right.metrics["gallery_described"],
        right.metrics["gallery_place_accuracy"],
        right.metrics["gallery_chair_i"],
    ) == (1, 1, 0)
    assert right.metrics["gallery_words"] > 60
    wrong = bench.score([long_record(i, long_caption(scenes[i - 1])) for i in range(20)])
    assert wrong.metrics["gallery_described"] < 0.4
    assert wrong.metrics["gallery_place_accuracy"] < 0.5


def test_the_gallery_has_the_same_tasks_and_two_lengths_of_captions():
    names = {name: [bench.name.split("_")[1] for bench in get_benchmarks(name)] for name in ("demo", "gallery")}
    assert names["gallery"] == ["long", "short", *names["demo"][1:]]
    source = GALLERY.scene_row(3)
    [content] = get_benchmark("gallery_short").content(source)
    assert content["answers"] == [source["short_reference"]]
    assert get_benchmark("gallery_long").content(source)[0]["answers"] == source["references"]
