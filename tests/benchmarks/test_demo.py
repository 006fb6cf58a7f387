"""The demo world's captions are scored by what they get right, beside the papers' scores."""

import pytest

from demo.language import caption, references
from demo.world import scene_at
from pipelines.benchmarks import Record, get_benchmark


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
