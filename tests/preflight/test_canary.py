"""The canary: the demo model looks at its images; stages that do not, or that mix up rows, are found out."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from jobs.quality import main
from pipelines.config.load import load_config
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.find import Corpus
from pipelines.corpus.formats.images import FORMAT as IMAGES
from pipelines.corpus.formats.parquet import FORMAT as PARQUET
from pipelines.errors import UserError
from pipelines.output.unit import Unit
from pipelines.preflight.canary import CanaryResult, compare, run_canary, sample_spans
from pipelines.preflight.canary_stages import collect, partners
from pipelines.quality.config import QualityConfig
from pipelines.run.job import Actors
from pipelines.stages.unit_batch import Answer, CanaryCopy, Image, UnitBatch
from pipelines.store import Store
from tests.helpers import DEMO, LOCAL, fake_encoder


def canary(tmp_path: Path, corpus: Path, *arguments: str, generator: type | None = None) -> CanaryResult:
    settings = [*DEMO, f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "mlflow.enabled=false", *arguments]
    actors = {}
    if generator is not None:
        settings, actors = [*settings, LOCAL], {"actors": Actors(fake_encoder(), generator)}
    config = load_config(settings, QualityConfig)
    return run_canary(config, config.canary.images, config.canary.max_same, **actors)


def ignoring_generator() -> type:
    """A generator that says the same of every image."""

    class Ignoring:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict) -> dict:
            unit_batch = UnitBatch.from_row(row)
            for image in unit_batch.images:
                image.answers = [Answer("a nice picture .", 1, 2, 3, "stop") for _ in image.prompts]
            unit_batch.arrays = {}
            return unit_batch.to_row()

    return Ignoring


def mixing_generator() -> type:
    """A generator that looks, but does not put its captions back into the images' order."""

    class Mixing:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict) -> dict:
            unit_batch = UnitBatch.from_row(row)
            in_order = sorted(unit_batch.images, key=lambda image: image.sha256)
            for image, other in zip(unit_batch.images, in_order, strict=True):
                blank = " blank" if image.canary and image.canary.variant == "blank" else ""
                image.answers = [Answer(f"{other.sha256}{blank}", 1, 2, 3, "stop")]
            unit_batch.arrays = {}
            return unit_batch.to_row()

    return Mixing


@pytest.fixture(scope="module")
def corpus(scene_parquet: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    scene_parquet(folder / "a.parquet", 6)
    scene_parquet(folder / "b.parquet", 6, start=6)
    return folder


def test_the_demo_model_looks_at_its_images(corpus: Path, tmp_path: Path):
    result = canary(tmp_path, corpus, LOCAL, "canary.images=12", "generate.max_new_tokens=24")
    assert (result.images, result.captions, result.left_out) == (12, 12, 0)
    assert result.saw_the_images
    assert result.same_as_blank[0] == 0
    assert result.follows_swap
    assert result.follows_swap[0] > 0.9
    assert not (tmp_path / "out").exists()


def test_a_generator_that_ignores_images_is_found_out(corpus: Path, tmp_path: Path):
    result = canary(tmp_path, corpus, "canary.images=8", generator=ignoring_generator())
    assert not result.saw_the_images
    assert result.same_as_blank[0] == result.same_as_swapped[0] == 1
    assert result.same_as_blank[1] == pytest.approx(0.025 ** (1 / 8))  # Clopper and Pearson's lower end of 8 of 8


def test_captions_of_other_rows_show_in_the_swap(corpus: Path, tmp_path: Path):
    result = canary(tmp_path, corpus, "canary.images=8", generator=mixing_generator())
    assert result.saw_the_images
    assert result.follows_swap
    assert result.follows_swap[0] < 0.9


@pytest.mark.slow
def test_a_model_without_a_projector_fails_the_gate_with_code_3(
    corpus: Path, tmp_path: Path, demo_model: Path, ray_session: None, capsys
):
    blind = tmp_path / "blind"
    shutil.copytree(demo_model, blind)
    weights = load_file(blind / "model.safetensors")
    for name in [name for name in weights if "multi_modal_projector" in name]:
        weights[name] = weights[name] * 0
    save_file(weights, blind / "model.safetensors", {"format": "pt"})
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", f"model.path={blind}", "canary.images=8"]
    quick = ["generate.max_new_tokens=6", f"mlflow.tracking_uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    assert main([*DEMO, *arguments, *quick]) == 3
    printed = capsys.readouterr().out
    assert "DO NOT DEPEND on their images" in printed
    assert "the canary alone was measured" in printed
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["canary"]["same_as_blank"][0] == 1
    assert tracked_metrics(tmp_path / "mlflow.db")["canary/same_as_swapped"] == 1


def tracked_metrics(store: Path) -> dict[str, float]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("quality")
    assert experiment
    [run] = client.search_runs([experiment.experiment_id])
    return run.data.metrics


def test_partners_have_other_bytes():
    assert partners(["a", "b", "c"]) == [1, 2, 0]
    assert partners(["a", "a", "b"]) == [2, 2, 0]
    assert partners(["a", "a"]) == [None, None]
    assert partners(["a"]) == [None]


def summary(*captions: tuple[CanaryCopy, str], prompts: Sequence[str] = ("describe",) * 3) -> dict:
    """A unit as the last stage summarises it; `prompts` of its images by index."""
    images = [
        Image("", "a", 0, "0", [prompts[copy.index]], answers=[Answer(text, 1, 2, 3, "stop")], canary=copy)
        for copy, text in captions
    ]
    return json.loads(collect(UnitBatch(Unit("0" * 12, 0, 1, ("a",)), images).to_row())["summary"])


def test_images_that_lost_a_variant_are_left_out():
    said = [
        *((CanaryCopy("true", i), text) for i, text in enumerate("abc")),
        *((CanaryCopy("blank", i), text) for i, text in enumerate("xxc")),
        *((CanaryCopy("swapped", 0, 1), "b"), (CanaryCopy("swapped", 2, 0), "a")),
    ]
    unit = summary(*said)
    result = compare([unit], num_sampled=5, max_same=0.5)
    assert (result.images, result.left_out) == (2, 3)
    assert (result.same_as_blank[0], result.same_as_swapped[0]) == (0.5, 0)
    assert result.follows_swap
    assert result.follows_swap[0] == 1
    assert result.saw_the_images
    assert not compare([unit], num_sampled=5, max_same=0.4).saw_the_images
    with pytest.raises(UserError, match=r"canary\.images must find at least two different images"):
        compare([summary((CanaryCopy("true", 0), "a"))], num_sampled=1, max_same=0.1)
    different = compare([summary(*said, prompts=("one", "two", "three"))], num_sampled=5, max_same=0.5)
    assert (different.images, different.follows_swap) == (2, None), "other prompts, other captions"


def test_a_sample_is_spread_over_the_files():
    files = tuple(CorpusFile(f"{i}.parquet", 1, (100,)) for i in range(10))
    spans = sample_spans(Corpus(Store("/nowhere"), files, PARQUET), 64)
    assert [span.units[0].sources[0] for span in spans] == ["0.parquet", "2.parquet", "5.parquet", "7.parquet"]
    assert [span.units[0].num_images for span in spans] == [16] * 4
    assert len({span.units[0].name for span in spans}) == 4
    small = tuple(CorpusFile(f"{i}.parquet", 1, (3,)) for i in range(2))
    assert [s.units[0].num_images for s in sample_spans(Corpus(Store("/nowhere"), small, PARQUET), 64)] == [3, 3]
    pictures = tuple(CorpusFile(f"{i}.png", 1) for i in range(10))
    [span] = sample_spans(Corpus(Store("/nowhere"), pictures, IMAGES), 5)
    assert span.units[0].sources == ("0.png", "2.png", "4.png", "6.png", "8.png")
