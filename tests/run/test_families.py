"""The whole job with models of other families: pictures of any size in one unit, and what it refuses in one line."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otprune import num_kept
from otprune.models import read_checkpoint
from pipelines.accuracy.calibrate import calibrate
from pipelines.accuracy.config import CalibrateConfig
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.preflight.sample import draw_units, run_sample
from pipelines.run.job import prepare
from tests.helpers import LOCAL, run_captions, write_corpus
from tests.tiny import MAKERS

SIZES = [(80, 100), (300, 200), (200, 300), (40, 500), (480, 640), (300, 200), (28, 28)]  # height, width
FREE = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3")
RETENTION = {
    "llava_next": 0.098,
    "llava_onevision": 0.098,
    "internvl": 0.2,
    "gemma3": 0.5,
    **dict.fromkeys(("smolvlm", "idefics3"), 0.33),
    **dict.fromkeys(FREE, 0.33),  # merged from 2 x 2 patches, and as many as the picture is large
}  # of each family by default


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """family -> the folder of a tiny checkpoint."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = MAKERS[family](tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    noise = np.random.default_rng(0)
    images = []
    for height, width in SIZES:
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(stream := io.BytesIO(), "PNG")
        images.append(stream.getvalue())
    return write_corpus(tmp_path_factory.mktemp("corpus") / "a.parquet", [*images[:3], b"no picture", *images[3:]])


def settings(model: Path, corpus: Path, output: Path, **keys: object) -> list[str]:
    keys = {"prune.method": "otprune", "generate.max_new_tokens": 4, "prompt.template": "describe", **keys}
    places = [f"model.path={model}", f"input.path={corpus}", f"output.path={output}"]
    return [*places, LOCAL, "mlflow.enabled=false", *(f"{name}={value}" for name, value in keys.items())]


def captions(output: Path) -> list[dict]:
    return [row for file in sorted(output.glob("captions/*")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("qwen2_5_vl", "internvl", "smolvlm", "gemma3") else pytest.mark.slow)
        for name in RETENTION
    ],
)
def test_pictures_of_all_sizes_share_a_unit_and_keep_their_own_share(family, model, corpus, tmp_path):
    outcome = run_captions(prepare(load_config(settings(model(family), corpus, tmp_path))))
    assert outcome.code == 0
    geometry, retention = read_checkpoint(str(model(family))).geometry, RETENTION[family]
    rows = captions(tmp_path)
    assert [row["row"] for row in rows] == [0, 1, 2, 4, 5, 6, 7]  # row 3 is no picture
    for row, size in zip(rows, SIZES, strict=True):
        visual = geometry.num_visual(size)
        assert (row["num_visual_tokens"], row["num_kept_tokens"]) == (visual, num_kept(retention, visual))
    samples = json.loads((tmp_path / "samples.json").read_text())
    grids = {(sample["rows"], sample["columns"]) for sample in samples}
    assert grids == {geometry.grid(size) for size in SIZES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "per_tile"),
    [(name, False) for name in ("llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3")]
    + [("llava_next", True), ("internvl", True)],
)
def test_what_overviews_and_tiles_keep_is_reported(family, per_tile, model, corpus, tmp_path):
    """Compared with the tokens that the whole model's sequence has of each picture; `first` keeps its beginning."""
    keys = {"prune.method": "first", "prune.retention": 0.4, "prune.per_tile": per_tile}
    outcome = run_captions(prepare(load_config(settings(model(family), corpus, tmp_path, **keys))))
    geometry, counts = read_checkpoint(str(model(family))).geometry, Counter()
    for size in SIZES:
        if (frame := geometry.frame(size)).tile:
            rows, columns = geometry.grid(size)
            of_overview = set(range(rows * columns))
            visual = geometry.num_visual(size, "tiles" if per_tile else "joint")
            if frame.overview == "last":
                of_overview = {visual - 1 - token for token in of_overview}
            kept = range(num_kept(0.4, visual))
            if per_tile:
                step = rows * columns
                kept = [crop * step + i for crop in range(frame.num_crops) for i in range(num_kept(0.4, step))]
            of_kept = len(of_overview.intersection(kept))
            counts += Counter(overview=len(of_overview), tiles=visual - len(of_overview))
            counts += Counter(overview_kept=of_kept, tiles_kept=len(kept) - of_kept)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert Counter(stored["totals"]["crop_tokens"]) == counts
    kept = counts["overview_kept"] + counts["tiles_kept"]
    expected = {
        "kept_from/overview": counts["overview_kept"] / kept,
        "kept_from/tiles": counts["tiles_kept"] / kept,
        "retention/overview": counts["overview_kept"] / counts["overview"],
        "retention/tiles": counts["tiles_kept"] / counts["tiles"],
    }
    assert expected == pytest.approx({name: outcome.metrics[name] for name in expected})
    assert stored["last_run"]["kept_from/overview"] == outcome.metrics["kept_from/overview"]
    share = round(100 * expected["kept_from/overview"])
    assert f"<b>{share} %</b> of the kept tokens are of overviews" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("family", "method"), [("qwen2_5_vl", "first"), ("internvl", "none"), ("internvl", "resize")])
def test_nothing_is_said_of_overviews_without_tiles_or_where_all_is_kept(family, method, model, corpus, tmp_path):
    outcome = run_captions(prepare(load_config(settings(model(family), corpus, tmp_path, **{"prune.method": method}))))
    assert not [name for name in outcome.metrics if name.startswith(("kept_from/", "retention/"))]
    assert "overviews" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", FREE)
def test_a_smaller_picture_has_about_the_tokens_that_pruning_keeps(family, model, corpus, tmp_path):
    run_captions(prepare(load_config(settings(model(family), corpus, tmp_path, **{"prune.method": "resize"}))))
    geometry = read_checkpoint(str(model(family))).geometry
    for row, size in zip(captions(tmp_path), SIZES, strict=True):
        assert row["num_visual_tokens"] == geometry.num_visual(size)
        budget = num_kept(0.33, row["num_visual_tokens"])
        assert 0.5 * budget <= row["num_kept_tokens"] <= budget


def test_a_method_prunes_a_smaller_picture_to_its_share_of_the_whole_one(model, corpus, tmp_path):
    keys = {"prune.method": "first", "prune.shrink": 0.6, "prune.retention": 0.3}
    run_captions(prepare(load_config(settings(model(FREE[0]), corpus, tmp_path, **keys))))
    geometry = read_checkpoint(str(model(FREE[0]))).geometry
    for row, size in zip(captions(tmp_path), SIZES, strict=True):
        assert row["num_visual_tokens"] == geometry.num_visual(size)
        smaller = geometry.shrunk(0.6).num_visual(size)
        assert row["num_kept_tokens"] == num_kept(0.5, smaller)


def test_a_picture_of_fewer_tiles_stays_within_what_pruning_keeps_or_has_one(model, corpus, tmp_path):
    keys = {"prune.method": "resize", "prune.retention": 0.45}
    run_captions(prepare(load_config(settings(model("internvl"), corpus, tmp_path, **keys))))
    geometry, crops = read_checkpoint(str(model("internvl"))).geometry, []
    for row, size in zip(captions(tmp_path), SIZES, strict=True):
        assert row["num_visual_tokens"] == geometry.num_visual(size)
        assert row["num_kept_tokens"] <= max(16, num_kept(0.45, row["num_visual_tokens"]))
        crops.append(row["num_kept_tokens"] // 16)
    assert set(crops) == {1, 3}  # one tile, or two and an overview


@pytest.mark.parametrize("family", [FREE[0], "internvl"])
def test_the_gate_compares_smaller_pictures_with_whole_ones(family, model, corpus, tmp_path):
    keys = {"prune.method": "resize", "run.samples": 0, "gate.min_quality": 0.9}
    job = prepare(load_config(settings(model(family), corpus, tmp_path, **keys)))
    spans = draw_units(job, 16, 0, shown=True)
    smaller, whole = (
        [image for summary in run_sample(job, spans, method=method) for image in summary["samples"]]
        for method in (None, "none")
    )
    geometry = read_checkpoint(str(model(family))).geometry
    assert [(image["rows"], image["columns"]) for image in whole] == list(map(geometry.grid, SIZES))
    changed = [a["captions"] != b["captions"] for a, b in zip(smaller, whole, strict=True)]
    assert any(changed), "the smaller pictures are others"


def test_tiles_are_chosen_each_by_itself_if_the_user_says_so(model, corpus, tmp_path):
    keys = {"prune.per_tile": True, "prune.retention": 0.1}
    run_captions(prepare(load_config(settings(model("internvl"), corpus, tmp_path, **keys))))
    for row in captions(tmp_path):
        assert row["num_kept_tokens"] == row["num_visual_tokens"] // 16 * num_kept(0.1, 16)


def test_the_limit_of_tiles_is_the_users_and_part_of_the_fingerprint(model, corpus, tmp_path):
    run_captions(prepare(load_config(settings(model("internvl"), corpus, tmp_path / "a", **{"model.max_tiles": 2}))))
    assert {row["num_visual_tokens"] for row in captions(tmp_path / "a")} == {16, 48}
    assert json.loads((tmp_path / "a" / "fingerprint.json").read_text())["model.max_tiles"] == 2
    job = prepare(load_config(settings(model("internvl"), corpus, tmp_path / "b")))
    assert job.described["model.max_tiles"] == job.config.model.max_tiles == 6, "the checkpoint's own"


def test_labels_are_part_of_the_prompt_and_a_limit_of_tiles_shortens_the_longest_edge(model, corpus, tmp_path):
    keys = {"model.max_tiles": 4, "prune.method": "resize", "prune.retention": 1.0}
    run_captions(prepare(load_config(settings(model("smolvlm"), corpus, tmp_path, **keys))))
    rows = captions(tmp_path)
    # 1 x 3 or 2 x 2 tiles, and the overview. A label is 2 ids; a line break stands behind each row and behind the last.
    texts = {row["num_visual_tokens"]: row["num_prompt_tokens"] - row["num_kept_tokens"] for row in rows}
    assert set(texts) == {64, 80}
    assert texts[80] - texts[64] == (2 * 5 + 3) - (2 * 4 + 2)


@pytest.mark.parametrize(("family", "pixels"), [("qwen2_5_vl", 64 * 28**2), ("mistral3", 64 * 14**2)])
def test_the_limit_of_pixels_is_the_users_and_part_of_the_fingerprint(family, pixels, model, corpus, tmp_path):
    run_captions(prepare(load_config(settings(model(family), corpus, tmp_path, **{"model.max_pixels": pixels}))))
    assert 50 <= max(row["num_visual_tokens"] for row in captions(tmp_path)) <= 64
    assert json.loads((tmp_path / "fingerprint.json").read_text())["model.max_pixels"] == pixels


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("qwen2_5_vl", {"prune.method": "fastv"}, "fastv looks inside the language model, which runs for LLaVA alone"),
        ("qwen2_5_vl", {"prune.method": "prumerge"}, "prumerge reads the attention of a class token"),
        ("qwen2_5_vl", {"prune.method": "m3"}, "m3 makes tokens of several places"),
        ("qwen2_5_vl", {"decode.aspect": "pad"}, "decode.aspect must be auto, as pictures keep their shape, got pad"),
        ("qwen2_5_vl", {"model.max_pixels": 100}, "model.max_pixels must be at least model.min_pixels"),
        ("qwen2_5_vl", {"model.max_pixels": 12845056, "unit.images": 256}, "unit.images must be at most 55"),
        (
            "qwen2_5_vl",
            {"prune.method": "resize", "gate.min_quality": 1, "model.max_pixels": 12845056, "unit.images": 100},
            "unit.images must be at most 55",
        ),
        ("llava", {"prune.method": "resize"}, "resize needs a model of free picture size, got a LLaVA-1.5"),
        ("llava_next", {"prune.method": "resize"}, "resize needs a model of free picture size, got a LLaVA-1.6"),
        ("llava_onevision", {"prune.method": "prumerge"}, "prumerge reads the attention of a class token"),
        ("llava_onevision", {"prune.method": "fastv"}, "one size alone, so it cannot prune LLaVA-OneVision"),
        ("llava_onevision", {"prune.method": "resize"}, "resize needs a model of free picture size, got a LLaVA-One"),
        ("llava", {"model.max_pixels": 1000}, "model.max_pixels and model.min_pixels must be null"),
        ("qwen3_5", {"prune.method": "fastv"}, "layers with linear attention, which have neither"),
        ("internvl", {"prune.method": "fastv"}, "fastv looks inside the language model, which runs for LLaVA alone"),
        ("internvl", {"prune.method": "prumerge"}, "prumerge reads the attention of a class token"),
        ("internvl", {"prune.method": "m3"}, "m3 makes tokens of several, which has not been tried with InternVL"),
        ("internvl", {"decode.aspect": "pad"}, "decode.aspect must be auto, as pictures are stretched to their tiles"),
        ("internvl", {"model.max_pixels": 10**6}, "must be null: model.max_tiles limits the tiles"),
        ("internvl", {"model.max_tiles": 900, "unit.images": 256}, "unit.images must be at most 253 "),
        ("mistral3", {"prune.method": "fastv"}, "fastv looks inside the language model, which runs for LLaVA alone"),
        ("mistral3", {"prune.method": "prumerge"}, "prumerge reads the attention of a class token"),
        ("mistral3", {"prune.method": "m3"}, "m3 makes tokens of several places, and Mistral-Small-3 needs the place"),
        ("mistral3", {"decode.aspect": "pad"}, "decode.aspect must be auto, as pictures keep their shape, got pad"),
        ("mistral3", {"model.min_pixels": 100}, "must be null, as pictures are never enlarged, got 100"),
        ("mistral3", {"model.max_pixels": 100}, "model.max_pixels must be at least 196, the 14 x 14 of one token"),
        ("smolvlm", {"prune.method": "fastv"}, "fastv looks inside the language model, which runs for LLaVA alone"),
        ("smolvlm", {"prune.method": "prumerge"}, "prumerge reads the attention of a class token"),
        ("smolvlm", {"prune.method": "m3"}, "m3 makes tokens of several, which has not been tried with SmolVLM"),
        ("smolvlm", {"decode.aspect": "pad"}, "decode.aspect must be auto, as pictures are stretched to their tiles"),
        ("smolvlm", {"model.max_pixels": 10**6}, "must be null: model.max_tiles limits the tiles"),
        ("smolvlm", {"model.max_tiles": 12}, "max_tiles must be 1 to 9, the tiles of a square picture"),
        ("qwen3_vl", {"prompt.template": "see <|image_pad|> it"}, "exactly one image, got 2 in 'see <|image_pad|> it'"),
        ("qwen3_vl", {"prompt.more": "['see <|image_pad|> it']"}, "exactly one image, got 2 in 'see <|image_pad|> it'"),
        ("internvl", {"prompt.system": "a <IMG_CONTEXT>"}, "exactly one image, got 2 in 'a <IMG_CONTEXT>'"),
        ("gemma3", {"prune.method": "fastv"}, "fastv looks inside the language model, which runs for LLaVA alone"),
        (
            "gemma3",
            {"engine.name": "vllm", "ray.address": "auto"},
            "got vllm: Gemma 3 has not been compared with transf",
        ),
        (
            "gemma3",
            {"engine.name": "vllm", "ray.address": "auto", "prune.method": "none"},
            "got vllm: Gemma 3 has not been compared with transformers on a GPU",
        ),
        ("gemma3", {"prune.method": "prumerge"}, "prumerge reads the attention of a class token"),
        ("gemma3", {"prune.method": "resize"}, "resize needs a model of free picture size, got a Gemma 3"),
        (
            "gemma3",
            {"decode.aspect": "pad"},
            "decode.aspect must be auto or stretch, as the model was trained, got pad",
        ),
        ("gemma3", {"prompt.template": "a <start_of_image>"}, "exactly one image, got 2 in 'a <start_of_image>'"),
        ("gemma3", {"prompt.template": "a <image_soft_token>"}, "exactly one image, got 2 in 'a <image_soft_token>'"),
        ("llava_next", {"model.max_tiles": 6}, "model.max_tiles must be null: the number of tiles can be chosen"),
        ("qwen3_vl", {"model.max_tiles": 6}, "model.max_tiles must be null: the number of tiles can be chosen"),
    ],
)
def test_what_a_family_cannot_do_is_one_line(family, keys, says, model, corpus, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(load_config(settings(model(family), corpus, tmp_path, **keys)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "method"), [("qwen3_vl", "fitprune"), ("internvl", "vtw")])
def test_methods_inside_the_model_are_not_calibrated_where_they_do_not_run(family, method, model, corpus):
    arguments = [f"model.path={model(family)}", f"input.path={corpus}", f"prune.method={method}"]
    with pytest.raises(UserError, match=f"method {method} looks inside the language model, which runs for LLaVA"):
        calibrate(load_config(arguments, CalibrateConfig))


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [("chat_template.jinja", "hello", "the chat template of"), ("tokenizer.json", "", "tokenizer")],
)
def test_a_checkpoint_that_cannot_write_a_prompt_ends_the_job_and_not_every_image(
    file, text, says, model, corpus, tmp_path
):
    folder = shutil.copytree(model("qwen3_vl"), tmp_path / "model")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        prepare(load_config(settings(folder, corpus, tmp_path / "out")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
