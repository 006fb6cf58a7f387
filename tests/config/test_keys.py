"""The configuration: defaults < YAML < key=value; errors that name the key, what it must be, and the nearest one."""

from dataclasses import FrozenInstanceError, fields

import pytest
import yaml

from pipelines.accuracy.config import AccuracyConfig, EvaluateConfig
from pipelines.config.keys import Config
from pipelines.config.load import DEMO_CONFIG, check_bounds, help_text, load_config, to_yaml
from pipelines.errors import UserError
from pipelines.study.config import StudyConfig
from pipelines.sweep.config import SweepConfig
from tests.conftest import REPOSITORY

OWN_MODEL = "model.path=some/model"  # without it the demo configuration is the base
KEYS = Config().dotted()
SHIPPED = [  # the others are manifests for clusters, or prices
    file for file in sorted((REPOSITORY / "conf").glob("*.yaml")) if "model" in yaml.safe_load(file.read_text())
]
SCHEMAS = {
    "evaluate": EvaluateConfig,
    "accuracy": AccuracyConfig,
    "study": StudyConfig,
    "sweep": SweepConfig,
}  # by the first word of the file's name
BOUNDED = [
    (f"{section.name}.{k.name}", k.metadata)
    for section in fields(Config)
    for k in fields(getattr(Config(), section.name))
    if {"low", "high", "above"} & set(k.metadata)
]


def error_of(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config([OWN_MODEL, *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_file(tmp_path, text: str) -> str:
    (tmp_path / "own.yaml").write_text(text)
    return str(tmp_path / "own.yaml")


def test_overrides_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = yaml_file(tmp_path, "prune:\n  retention: 0.3\n  seed: 5\nunit:\n  images: 7\n")
    config = load_config(["--config", file, "prune.retention=0.5"])
    assert (config.prune.retention, config.prune.seed, config.unit.images) == (0.5, 5, 7)
    assert config.generate == Config().generate


def test_of_two_overrides_of_one_key_the_last_wins():
    assert load_config([OWN_MODEL, "prune.seed=1", "prune.seed=2"]).prune.seed == 2


def test_no_arguments_mean_the_demo():
    assert load_config([]) == load_config(["--config", str(DEMO_CONFIG)])
    assert DEMO_CONFIG in SHIPPED
    assert load_config([]).model.path == "demo/checkpoint"
    assert load_config(["prune.method=divprune"]).model.path == "demo/checkpoint"


def test_a_model_of_ones_own_takes_nothing_from_the_demo():
    config = load_config([OWN_MODEL])
    expected = KEYS | {"model.path": "some/model"}
    assert config.dotted() == expected


def test_a_config_file_takes_nothing_from_the_demo(tmp_path):
    assert load_config(["--config", yaml_file(tmp_path, "run:\n  samples: 3\n")]).input.path == ""


def test_the_config_file_may_follow_an_equals_sign(tmp_path):
    assert load_config([f"--config={yaml_file(tmp_path, 'run: {samples: 3}')}"]).run.samples == 3


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_configuration_loads_and_opens_with_its_command(file):
    schema = SCHEMAS.get(file.stem.partition("_")[0], Config)
    load_config(["--config", str(file)], schema)
    head = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "python jobs/" in head


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("prune.retentoin=0.1", "prune.retention"),
        ("retention=0.1", "prune.retention"),
        ("prunes.retention=0.1", "prune"),
        ("generate.max_tokens=3", "generate.max_new_tokens"),
        ("input.pth=x", "input.path"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(typo, nearest):
    text = error_of(typo)
    assert text.startswith("unknown key ")
    assert text.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_like_no_other_points_to_help():
    assert "--help" in error_of("zzzzzz.qqqqqq=1")


def test_an_unknown_key_of_a_yaml_file_is_named_too(tmp_path):
    text = error_of("--config", yaml_file(tmp_path, "prune:\n  retentoin: 0.1\n"))
    assert text == "unknown key prune.retentoin; did you mean prune.retention?"


def test_a_dotted_key_in_yaml_is_explained(tmp_path):
    text = error_of("--config", yaml_file(tmp_path, "prune.retention: 0.1\n"))
    assert text == "unknown key prune.retention; in YAML it is the key retention of the section prune"


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("prune.retention=abc", "prune.retention", "float"),
        ("prune.retention=[1]", "prune.retention", "float"),
        ("prune.retention=true", "prune.retention", "float"),
        ("prune.retention.deeper=1", "prune.retention", "float"),
        ("unit.images=8.5", "unit.images", "int"),
        ("unit.images=null", "unit.images", "int"),
        ("input.limit=many", "input.limit", "int | None"),
        ("mlflow.enabled=maybe", "mlflow.enabled", "bool"),
        ("prompt.more=one text", "prompt.more", "list[str]"),
        ("output.on_mismatch=overwrite", "output.on_mismatch", "['refuse', 'new']"),
        ("prune.gamma_scale=papr", "prune.gamma_scale", "['released', 'paper', 'trace']"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_key_and_what_it_must_be(override, name, expected):
    text = error_of(override)
    assert text.startswith(f"{name} must be ")
    assert expected in text


def test_a_section_given_a_value_is_named(tmp_path):
    assert error_of("prune=0.1") == "prune must be a section with keys, got 0.1"
    assert error_of("--config", yaml_file(tmp_path, "prune: [1]\n")) == "prune must be a section with keys, got [1]"


def test_a_section_whose_keys_are_all_commented_out_changes_nothing(tmp_path):
    config = load_config(["--config", yaml_file(tmp_path, "prune:\n#  retention: 0.1\nunit:\n  images: 3\n")])
    assert config.prune == Config().prune
    assert config.unit.images == 3


@pytest.mark.parametrize(("name", "bounds"), BOUNDED, ids=[name for name, _ in BOUNDED])
def test_bounds_hold_at_and_beyond_their_edge(name, bounds):
    for bound, outside in (("low", -1), ("high", 1), ("above", 0)):
        if bound in bounds:
            text = error_of(f"{name}={bounds[bound] + outside}")
            assert text.startswith(f"{name} must be ")
            assert str(bounds[bound]) in text
    for bound in {"low", "high"} & set(bounds):
        load_config([OWN_MODEL, f"{name}={bounds[bound]}"])


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf", "-.inf"])
def test_numbers_must_be_finite(value):
    assert error_of(f"cost.usd_per_hour={value}").startswith("cost.usd_per_hour must be a finite number, got ")


def test_null_is_the_absence_of_an_optional_value():
    config = load_config(["input.limit=null", "cost.usd_per_hour=null", "mlflow.tracking_uri=null", "ray.address="])
    assert (config.input.limit, config.cost.usd_per_hour) == (None, None)
    assert (config.mlflow.tracking_uri, config.ray.address) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        "{title}",
        "{title}: what is it?",
        "Q: is it #1?",
        "yes",
        "null",
        "1.50",
        "0123",
        "- dash",
        "[bracket",
        "*star",
        "100 % of a=b",
        'a "word" and it\'s',
        "naïve \U0001f600",
        "back\\slash",
        "two\nlines",
    ],
)
def test_text_is_taken_as_it_is_and_not_as_yaml(text):
    assert load_config([OWN_MODEL, f"prompt.template={text}"]).prompt.template == text


def test_quotes_around_a_whole_text_are_dropped():
    for quote in "'\"":
        assert load_config([f"prompt.template={quote}a: b{quote}"]).prompt.template == "a: b"


def test_lists_are_yaml():
    assert load_config(["prompt.more=[what is it ?, '{title}']"]).prompt.more == ["what is it ?", "{title}"]


@pytest.mark.parametrize("argument", ["word", "--flag", "-x=1", "--config"])
def test_an_argument_that_is_no_setting_is_refused(argument):
    assert "--config" in error_of(argument)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prune: [", "must be readable YAML: "),
        ("prune:\n  seed: 1\n  seed: 2\n", "must be readable YAML: "),  # which of the two is meant?
        ("- a\n- b\n", "must hold sections with keys"),
    ],
)
def test_a_broken_yaml_file_is_one_clear_line(tmp_path, text, problem):
    assert f"own.yaml {problem}" in error_of("--config", yaml_file(tmp_path, text))


def test_an_absent_or_binary_config_file_is_named(tmp_path):
    assert "none at /no/such.yaml" in error_of("--config", "/no/such.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "binary.yaml must be readable YAML" in error_of("--config", str(tmp_path / "binary.yaml"))
    assert "none at" in error_of("--config", str(tmp_path))


def test_every_key_has_a_meaning_and_stands_in_help():
    text = help_text("usage")
    for section in fields(Config):
        for k in fields(getattr(Config(), section.name)):
            meaning = k.metadata["meaning"]
            assert len(meaning) > 5
            assert "\n" not in meaning
            line = next(line for line in text.splitlines() if line.startswith(f"  {section.name}.{k.name} "))
            assert meaning in line
            assert "default" in line


def test_the_resolved_configuration_as_yaml_loads_as_itself(tmp_path):
    config = load_config(["prompt.template=Q: {title} #1", "prompt.more=['yes', '{x}']", "prune.gamma=null"])
    assert load_config(["--config", yaml_file(tmp_path, to_yaml(config))]) == config


def test_a_loaded_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        load_config([]).prune.retention = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_the_defaults_keep_to_their_own_bounds():
    check_bounds(Config())


def test_nothing_is_read_from_the_environment(monkeypatch):
    before = load_config([])
    for name in KEYS:
        monkeypatch.setenv(name.upper().replace(".", "_"), "1")
        monkeypatch.setenv(f"OTPRUNE_{name.upper().replace('.', '_')}", "1")
    assert load_config([]) == before
