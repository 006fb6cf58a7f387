"""Budgets of methods inside the model, settings checked before anything runs, and calibration on the user's images."""

import json

import pytest
from transformers import AutoConfig

from jobs.calibrate import main as calibrate
from jobs.caption_corpus import main
from otprune.budget import match_budget
from otprune.flops import prefill_flops
from otprune.methods import get_method
from otprune.methods.fitprune import LLAVA_15_7B_RECIPES
from otprune.methods.vtw_search import first_searched
from otprune.models import read_checkpoint
from otprune.shapes import MODELS, LanguageShape
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.run.job import check_pruning
from pipelines.run.pruning import num_text, prefill_flops_of, resolve_pruning
from tests.helpers import DEMO, read_rows

SHAPE = MODELS["llava-1.5-7b"].language
NOTHING = {"fastv": {"layer": None, "kept": None}, "vtw": {"layer": None}, "pyramiddrop": {"stages": None}}


def cost(method: str, **settings) -> int:
    return prefill_flops(SHAPE, 57, visual=get_method(method).visual_rows(576, SHAPE.layers, **settings))


def matched(method: str, retention: float = 0.098, **given) -> dict:
    return match_budget(method, NOTHING[method] | given, retention, SHAPE, 57, 576)[0]


def test_a_budget_is_the_smallest_that_costs_no_less_than_the_selector():
    target = cost("otprune", retention=0.098)
    fastv = matched("fastv")
    assert fastv["layer"] == 2
    assert cost("fastv", layer=2, kept=fastv["kept"] - 1) < target <= cost("fastv", **fastv)
    vtw = matched("vtw")
    assert cost("vtw", layer=vtw["layer"] - 1) < target <= cost("vtw", **vtw)
    stages = matched("pyramiddrop", retention=0.5)["stages"]
    assert cost("pyramiddrop", stages=stages) >= cost("otprune", retention=0.5)
    assert list(stages) == [8, 16, 24]
    fewer = {layer: kept * (stages[8] - 4) // stages[8] for layer, kept in stages.items()}
    assert cost("pyramiddrop", stages=fewer) < cost("otprune", retention=0.5)


def test_given_settings_stay_and_the_rest_is_matched():
    assert matched("fastv", kept=100) == {"layer": 2, "kept": 100}
    assert matched("fastv", layer=1)["kept"] > matched("fastv", layer=2)["kept"] > matched("fastv", layer=3)["kept"]
    assert matched("vtw", layer=16) == {"layer": 16}
    original = {"positions": "original"}  # which costs nothing
    assert matched("pyramiddrop", 0.5, **original) == matched("pyramiddrop", 0.5) | original


def test_where_two_full_layers_cost_more_than_the_budget_fastv_sees_one():
    assert matched("fastv", retention=0.02) == {"layer": 1, "kept": 1}


def resolved(demo_model, *arguments: str) -> dict:
    return resolve_pruning(load_config([*DEMO, *arguments]), read_checkpoint(str(demo_model)))


def test_a_method_before_the_model_needs_no_more_than_its_settings(demo_model):
    assert resolved(demo_model) == {"precision": "float32"}
    assert resolved(demo_model, "prune.method=m3") == {"grid": None}
    assert num_text(load_config(DEMO), read_checkpoint(str(demo_model))) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune.method=fitprune",), "prune.settings.recipe must be set: jobs/calibrate.py"),
        (("prune.method=fitprune", "prune.settings.recipe=none.json"), "prune.settings.recipe must be a file of jobs/"),
        (("prune.method=fitprune", "prune.settings.recipe={4: 1}"), r"settings of fitprune must fit .*layers \[0, 4\)"),
        (("prune.method=fastv", "prune.settings.kept=300"), r"tokens kept from layer 2 on must be in \[0, 256\]"),
        (
            ("prune.method=vtw", "prune.settings.layer=5"),
            r"settings of vtw must fit .*: layer must be in \[0, 4\]",
        ),
        (("prune.method=m3", "prune.settings.grid=5"), r"prune.settings.grid must be one of \[1, 2, 4, 8, 16\]"),
        (("prune.method=logdet_adaptive",), "prune.settings.threshold must be set: jobs/calibrate.py"),
        (("prune.method=cdpruner",), "prune.settings.clip must name the CLIP checkpoint"),
        (("prune.method=cdpruner", "prune.settings.clip=/none"), "prune.settings.clip must be a folder or a hub"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_runs(demo_model, arguments, message):
    with pytest.raises(UserError, match=message):
        check_pruning(load_config([*DEMO, *arguments]), read_checkpoint(str(demo_model)))


@pytest.mark.slow
def test_a_recipe_fitted_to_the_corpus_is_one_that_the_job_takes(demo_model, scene_parquet, tmp_path, capsys):
    arguments = [*DEMO, f"input.path={scene_parquet(tmp_path / 'in' / 'a.parquet', 8)}", "output.path="]
    found = tmp_path / "found.json"
    more = [*arguments, f"calibrate.path={found}", "calibrate.samples=6", "prune.retention=0.5"]
    assert calibrate([*more, "prune.method=fitprune"]) == 0
    stored = json.loads(found.read_text())
    assert (stored["method"], stored["samples"]) == ("fitprune", 6)
    settings = resolved(demo_model, "prune.method=fitprune", f"prune.settings.recipe={found}")
    assert settings == {"recipe": {int(layer): number for layer, number in stored["recipe"].items()}}
    assert 0 < sum(settings["recipe"].values()) <= 256
    assert calibrate([*more, "prune.method=vtw"]) == 0
    stored = json.loads(found.read_text())
    assert list(stored["divergences"]) == ["1", "2", "3"]
    assert stored["layer"] in (1, 2, 3, 4)
    assert stored["divergences"]["1"] > stored["divergences"]["3"]
    assert calibrate([*more, "prune.method=vtw", "calibrate.threshold=0"]) == 2
    assert (
        "calibrate.threshold must be one that a layer in [1, 3] meets, got 0: the smallest" in capsys.readouterr().err
    )
    assert calibrate([*more, "prune.method=fastv"]) == 2
    assert "prune.method must be fitprune or logdet_adaptive or vtw" in capsys.readouterr().err


def test_a_budget_for_each_picture_is_calibrated_and_taken_by_the_job(demo_model, scene_parquet, tmp_path):
    """Wanted 10 % of six scenes' tokens: 154 of 1,536."""
    corpus, found = scene_parquet(tmp_path / "in" / "a.parquet", 6), tmp_path / "found.json"
    arguments = [*DEMO, f"input.path={corpus}", "prune.method=logdet_adaptive", "prune.retention=0.1"]
    assert calibrate([*arguments, "output.path=", f"calibrate.path={found}"]) == 0
    stored = json.loads(found.read_text())
    assert stored["samples"] == 6
    assert stored["kept"] == 154 / 1536
    arguments += [f"prune.settings.threshold={found}", f"output.path={tmp_path / 'out'}", "mlflow.enabled=false"]
    assert resolved(demo_model, *arguments) == {"threshold": stored["threshold"], "most": 3.0}
    assert main([*arguments, "ray.address=none", "generate.max_new_tokens=2"]) == 0
    kept = [row["num_kept_tokens"] for row in read_rows(tmp_path / "out")]
    assert sum(kept) == 154
    assert len(set(kept)) > 1


@pytest.mark.parametrize(("num_layers", "first"), [(4, 1), (28, 4), (32, 5), (40, 5)])
def test_vtw_is_searched_from_the_releases_layer_on(num_layers, first):
    assert first_searched(num_layers) == first


def test_a_released_recipe_can_be_given_as_it_is():
    recipe = dict(LLAVA_15_7B_RECIPES[90])
    assert match_budget("fitprune", {"recipe": recipe}, 0.098, SHAPE, 57, 576)[0] == {"recipe": recipe}


def test_a_prompts_work_is_counted_layer_by_layer(demo_model):
    config, checkpoint = load_config([*DEMO, "prune.method=vtw"]), read_checkpoint(str(demo_model))
    shape = LanguageShape.from_config(AutoConfig.from_pretrained(demo_model).text_config)
    rows = get_method("vtw").visual_rows(256, 4, layer=1)
    assert prefill_flops_of(config, checkpoint, {"layer": 1}, 265) == prefill_flops(shape, 9, visual=rows)
    assert prefill_flops_of(load_config(DEMO), checkpoint, {}, 34) == prefill_flops(shape, 34)
    assert prefill_flops_of(config, checkpoint, {"layer": 1}, 0) > 0  # before the first caption
