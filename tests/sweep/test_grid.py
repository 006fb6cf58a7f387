"""The grid of a sweep: which points it makes, in which order, and what it refuses."""

import pytest

from pipelines.config.load import load_config, with_values
from pipelines.errors import UserError
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.grid import make_points
from pipelines.sweep.submit import entrypoint


def sweep(grid: str, *more: str) -> SweepConfig:
    return load_config(["output.path=/tmp/nowhere", *more, f"sweep.grid={grid}"], SweepConfig)


def names(grid: str, *more: str) -> list[str]:
    """Names without the keys at their ends."""
    return [point.name.rpartition("-")[0] for point in make_points(sweep(grid, *more))]


def test_every_method_meets_every_retention_and_cluster_and_none_only_clusters():
    grid = "{method: [otprune, random], retention: [0.1, 0.2], cluster: [{encode.actors: 1}, {encode.actors: 2}]}"
    per_cluster = ["none", "otprune-0.1", "otprune-0.2", "random-0.1", "random-0.2", "uniform-0.1", "uniform-0.2"]
    assert names(grid) == [f"{name}-{cluster}" for cluster in ("e1g1", "e2g1") for name in per_cluster]


def test_a_cluster_sets_its_keys_and_only_its_points():
    grid = "{method: [none], cluster: [{name: small}, {name: big, generate.actors: 3, cost.usd_per_hour: 7}]}"
    small, big = make_points(sweep(grid, "sweep.baselines=false"))
    assert (small.config.generate.actors, big.config.generate.actors) == (1, 3)
    assert (small.config.cost.usd_per_hour, big.config.cost.usd_per_hour) == (0.0832, 7)
    assert (small.values["cluster"], big.values["cluster"]) == ("small", "big")


def test_baselines_are_in_every_sweep_unless_refused():
    assert names("{method: [otprune]}") == ["none", "otprune-0.098", "random-0.098", "uniform-0.098"]
    assert names("{method: [otprune]}", "sweep.baselines=false") == ["otprune-0.098"]


def test_batch_engine_and_any_other_key_are_axes():
    grid = "{method: [otprune], batch: [8, 16], generate.max_new_tokens: [4, 8], engine: [transformers]}"
    points = make_points(sweep(grid, "sweep.baselines=false"))
    found = [(point.config.generate.batch_size, point.config.generate.max_new_tokens) for point in points]
    assert found == [(8, 4), (8, 8), (16, 4), (16, 8)]
    assert points[0].name.startswith("otprune-0.098-batch-8-max_new_tokens-4-")


def test_a_group_is_what_the_unpruned_model_captions_alike():
    grid = "{method: [otprune], batch: [8, 16], generate.max_new_tokens: [4, 8]}"
    points = make_points(sweep(grid))
    assert len({point.group for point in points}) == 2
    assert {point.group for point in points if point.config.generate.max_new_tokens == 4} == {points[0].group}


def test_the_key_changes_with_captions_and_speed_but_not_with_prices_or_tracking():
    def key(*more: str) -> str:
        return make_points(sweep("{method: [none]}", *more))[0].key

    same = key()
    assert key("mlflow.experiment=x", "cost.usd_per_hour=3", "run.samples=1", "output.path=/tmp/elsewhere") == same
    for more in ("generate.max_new_tokens=7", "encode.actors=2", "input.limit=9", "unit.images=9", "prompt.template=x"):
        assert key(more) != same, more


def test_the_grid_may_be_a_file(tmp_path):
    (tmp_path / "grid.yaml").write_text("method: [none]\n")
    assert names(str(tmp_path / "grid.yaml"), "sweep.baselines=false") == ["none"]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("null", "must map axes"),
        ("[1]", "must map axes"),
        ("/nowhere.yaml", "must name a YAML file"),
        ("{methods: [a]}", "'methods'"),
        ("{method: otprune}", "must be a list"),
        ("{method: []}", "must be a list"),
        ("{method: [quantum]}", "prune.method must be one of"),
        ("{retention: [1.5]}", "retention must be above 0"),
        ("{retention: [x]}", "retention must be above 0"),
        ("{output.path: [a]}", "'output.path'"),
        ("{batch: [0]}", "generate.batch_size must be"),
        ("{engine: [abacus]}", "engine.name must be"),
        ("{cluster: [big]}", "a cluster must be a mapping"),
        ("{cluster: [{prune.method: random}]}", "'prune.method'"),
        ("{cluster: [{ray.address: x}]}", "'ray.address'"),
        ("{cluster: [{encode.actors: many}]}", "encode.actors must be"),
        ("{cluster: [{}, {}]}", "different names"),
        ("{retention: [0.1, 0.1]}", "every value of an axis once"),
    ],
)
def test_a_wrong_grid_is_refused_and_says_what_is_wrong(grid, says):
    with pytest.raises(UserError, match=says):
        make_points(sweep(grid))


def test_the_command_for_another_cluster_is_the_same_job():
    prompt = 'what\'s "this" {id} # 1?'
    config = with_values(
        make_points(sweep("{method: [divprune]}", "input.path=/data/in", "sweep.baselines=false"))[0].config,
        {"prompt.template": prompt, "prompt.more": ["a, b", "c"], "input.limit": 5, "generate.temperature": 0.5},
    )
    import shlex

    command = shlex.split(entrypoint(config))
    assert command[:2] == ["python", "jobs/caption_corpus.py"]
    assert load_config(command[2:]) == config
