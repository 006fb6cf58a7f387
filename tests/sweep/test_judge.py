"""The quality of a sweep's points: which metric the advice goes by."""

from pathlib import Path

import pytest

from demo.language import references
from demo.world import scene_at
from pipelines.config.load import load_config
from pipelines.store import Store
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.judge import Judge
from tests.helpers import DEMO
from tests.quality.test_captions import scenes_corpus, write_output


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of scenes; long captions that are right, and those of the next scene; short ones."""
    folder = tmp_path_factory.mktemp("sweep")
    corpus, short = scenes_corpus(folder / "in")
    long = [" ".join(references(scene_at("corpus", i))) for i in range(len(short))]
    outputs = {"right": long, "wrong": [*long[1:], long[0]], "short": short}
    return {"corpus": corpus} | {name: write_output(folder / name, texts) for name, texts in outputs.items()}


def measured(places: dict[str, Path], name: str, unpruned: str, *arguments: str) -> dict:
    paths = (f"input.path={places['corpus']}", f"output.path={places['corpus']}/out", "sweep.resamples=50")
    judge = Judge(load_config([*DEMO, *paths, *arguments], SweepConfig))
    return judge.measure(Store(str(places[name])), Store(str(places[unpruned])))


def test_long_captions_are_compared_by_the_objects_they_name(places):
    found = measured(places, "wrong", "right")
    assert found["relative_by"] == "F1 of the objects named"
    value, low, high = found["relative"]
    assert low < value < high < 1
    assert value == pytest.approx(found["objects"]["object_f1"][0])  # the unpruned captions name all and no other
    assert measured(places, "right", "right")["relative"] == (1.0, 1.0, 1.0)


def test_short_ones_and_those_of_unknown_objects_are_compared_by_their_words(places):
    assert measured(places, "short", "short")["relative_by"] == "CIDEr against the references"
    unknown = measured(places, "wrong", "right", "quality.objects=none")
    assert (unknown["relative_by"], unknown["objects"]) == ("CIDEr against the references", None)
    agreement = measured(places, "wrong", "right", "sweep.metric=rouge_l")
    assert agreement["relative_by"] == "ROUGE-L against unpruned captions"
    assert agreement["relative"][0] == pytest.approx(agreement["agreement"]["rouge_l"][0])
