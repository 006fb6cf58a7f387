"""Every record answers what the rest asks of a method, and settings are refused by name."""

import re
from pathlib import Path

import pytest

from otprune import select
from otprune.methods import BASELINES, METHODS, UNPRUNED, InModel, Reducer, Selector, collect, get_method
from otprune.methods.m3 import METHOD as M3
from otprune.methods.positional import BLIND

ROOT = Path(__file__).parents[2]
INSIDE = [name for name, method in METHODS.items() if method.inside_model]


def check_settings(name: str, given: dict) -> dict:
    return get_method(name).check(given)


def test_every_record_stands_under_its_own_name_and_is_of_one_kind():
    assert all(method.name == name for name, method in METHODS.items())
    assert [name for name, method in METHODS.items() if isinstance(method, InModel)] == INSIDE
    assert INSIDE == ["fastv", "vtw", "fitprune", "pyramiddrop"]
    assert tuple(name for name, method in METHODS.items() if isinstance(method, Selector)) == select.METHODS
    keeping = [name for name, method in METHODS.items() if method.keeps_all]
    assert keeping == [UNPRUNED, "resize", *INSIDE]
    assert [name for name, method in METHODS.items() if method.sends_smaller] == ["resize"]
    assert all(isinstance(METHODS[name], Selector) for name in BASELINES)
    assert all(METHODS[method.name] is method for method in BLIND)


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ValueError, match="methods must have different names, got 'm3' twice"):
        collect(M3, METHODS["none"], M3)


def test_a_method_without_a_cost_cannot_be_made():
    with pytest.raises(TypeError, match="cost"):
        Selector(name="free", choose=lambda features, k: features)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="cost"):
        Reducer(name="free", reduce=lambda seen, k: [])  # pyright: ignore[reportCallIssue]


def test_the_table_of_the_readme_has_every_method_once():
    section = (ROOT / "README.md").read_text().partition("## Methods")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(name for name in METHODS if name != UNPRUNED)


def test_no_name_of_a_method_is_compared_outside_the_records():
    """Names stand where they are the user's defaults, in docstrings, and in the study of the paper's own claims."""
    names = "|".join(name for name in METHODS if name not in ("none", "first", "last"))
    quoted = re.compile(rf"[\"']({names})[\"']")
    allowed = ("otprune/methods/", "pipelines/study/", "pipelines/config/", "pipelines/accuracy/config.py")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("otprune", "pipelines")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(allowed)
        for line in path.read_text().splitlines()
        if quoted.search(line)
    ]
    assert [line for line in found if "==" in line or "case " in line or " in (" in line or "!=" in line] == []


def test_settings_are_completed_by_their_defaults():
    assert check_settings("otprune", {}) == {"precision": "float32"}
    assert check_settings("random", {}) == {}
    assert check_settings("fastv", {"layer": 3}) == {"layer": 3, "kept": None}
    assert check_settings("cdpruner", {"theta": 0.5}) == {"relevance": "clip", "clip": None, "theta": 0.5}
    assert check_settings("prumerge", {"adaptive": None}) == {"adaptive": False}


def test_layers_come_as_integers_in_order():
    assert check_settings("fitprune", {"recipe": {"10": 3, "2": 0}}) == {"recipe": {2: 0, 10: 3}}
    assert check_settings("fitprune", {"recipe": "recipe.json"}) == {"recipe": "recipe.json"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("uniform", {"layer": 1}, "settings of uniform must be absent, got 'layer'"),
        ("otprune", {"layer": 1}, "settings of otprune must be one of precision, got 'layer'"),
        ("divprune", {"precision": "half"}, "settings.precision must be one of float32, released, got 'half'"),
        ("fastv", {"layers": 1}, "settings of fastv must be one of layer, kept, got 'layers'"),
        ("fastv", {"layer": 0}, "settings.layer must be at least 1, got 0"),
        ("fastv", {"layer": True}, "settings.layer must be an integer, got True"),
        ("vtw", {"layer": "3"}, "settings.layer must be an integer, got '3'"),
        ("cdpruner", {"theta": 1.0}, "settings.theta must be below 1, got 1.0"),
        ("cdpruner", {"relevance": "bert"}, "settings.relevance must be one of clip, words, none, got 'bert'"),
        ("cdpruner", {"clip": 3}, "settings.clip must be text, got 3"),
        ("prumerge", {"adaptive": 1}, "settings.adaptive must be true or false, got 1"),
        ("pyramiddrop", {"stages": "a.json"}, "settings.stages must be {layer: number of tokens}, got 'a.json'"),
        ("pyramiddrop", {"stages": {"a": 1}}, "settings.stages must be .*got 'a': 1"),
        ("pyramiddrop", {"positions": "new"}, "settings.positions must be one of renumbered, original, got 'new'"),
        ("fitprune", {"recipe": {1: -1}}, "settings.recipe must be .*got 1: -1"),
        ("fitprune", {"recipe": 4}, "or a file, got 4"),
    ],
)
def test_wrong_settings_are_named(name, given, message):
    with pytest.raises(ValueError, match=message):
        check_settings(name, given)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"method must be one of none, otprune, .*got 'toprune'"):
        get_method("toprune")
