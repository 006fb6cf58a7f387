"""The registry of methods agrees with the code behind each name, and settings are refused by name."""

import pytest

from otprune import select
from otprune.budget import POLICIES
from otprune.methods import METHODS, check_settings, get_method
from otprune.schedules import SETTINGS


def test_every_implementation_is_registered_under_its_kind():
    kinds = {kind: {name for name, method in METHODS.items() if method.kind == kind} for kind in ("none", "in_llm")}
    assert kinds == {"none": {"none"}, "in_llm": set(POLICIES)}
    plain = {name for name, method in METHODS.items() if method.kind == "selector" and not method.requires}
    assert plain == set(select.METHODS)


def test_an_in_llm_method_takes_the_settings_that_its_cost_is_counted_from():
    for name in POLICIES:
        assert set(METHODS[name].settings) == set(SETTINGS[name])


def test_settings_are_completed_by_their_defaults():
    assert check_settings("otprune", {}) == {}
    assert check_settings("fastv", {"layer": 3}) == {"layer": 3, "kept": None}
    assert check_settings("cdpruner", {"theta": 0.5}) == {"relevance": "clip", "clip": None, "theta": 0.5}
    assert check_settings("prumerge", {"adaptive": None}) == {"adaptive": False}


def test_layers_come_as_integers_in_order():
    assert check_settings("fitprune", {"recipe": {"10": 3, "2": 0}}) == {"recipe": {2: 0, 10: 3}}
    assert check_settings("fitprune", {"recipe": "recipe.json"}) == {"recipe": "recipe.json"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("otprune", {"layer": 1}, "settings of otprune must be absent, got 'layer'"),
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
