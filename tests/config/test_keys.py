"""The configuration: defaults < YAML < key=value; errors that name the key, what it must be, and the nearest one."""

from dataclasses import FrozenInstanceError, asdict

import pytest
import yaml

from pipelines.accuracy.config import AccuracyConfig, EvaluateConfig
from pipelines.config.check import checked
from pipelines.config.keys import Config
from pipelines.config.load import DEMO_CONFIG, load_config, to_yaml, with_values
from pipelines.config.schema import keys_of
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
BOUNDED = [(k.name, k.bounds) for k in keys_of(Config).values() if k.bounds]


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
        ("prunes.retention=0.1", "prune.retention"),
        ("generate.max_tokens=3", "generate.max_new_tokens"),
        ("input.pth=x", "input.path"),
        ("max_new_tokens=3", "generate.max_new_tokens"),
        ("enc.num_gpus=1", "encode.num_gpus"),
        ("prun=1", "prune"),
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
    ("override", "expected", "got"),
    [
        ("prune.retention=abc", "a number above 0 and at most 1, or null", "'abc'"),
        ("prune.retention=[1]", "a number above 0 and at most 1, or null", "[1]"),
        ("prune.retention=true", "a number above 0 and at most 1, or null", "true"),
        ("prune.retention=0", "above 0 and at most 1", "0"),
        ("generate.top_p=", "a number above 0 and at most 1", "null"),
        ("prune.retention.deeper=1", "a number above 0 and at most 1, or null", "{'deeper': 1}"),
        ("prune.gamma=x", "a number above 0, or null", "'x'"),
        ("unit.images=8.5", "a whole number of at least 1 and at most 4096", "8.5"),
        ("unit.images=true", "a whole number of at least 1 and at most 4096", "true"),
        ("unit.images=null", "a whole number of at least 1 and at most 4096", "null"),
        ("input.limit=many", "a whole number of at least 1, or null", "'many'"),
        ("input.limit=???", "a whole number of at least 1, or null", "'???'"),
        ("mlflow.enabled=maybe", "true or false", "'maybe'"),
        ("prompt.more=one text", "a list of text", "'one text'"),
        ("prompt.more=[[1]]", "a list of text", "[[1]]"),
        ("prompt.more={a: 1}", "a list of text", "{'a': 1}"),
        ("prompt.more=null", "a list of text", "null"),
        ("prune.settings=[1]", "names with values", "[1]"),
        ("prune.settings={1: 2}", "names with values", "{1: 2}"),
        ("output.on_mismatch=overwrite", "refuse or new", "'overwrite'"),
        ("decode.aspect=fit", "auto, pad, crop or stretch", "'fit'"),
        ("model.max_pixels=0", "at least 1", "0"),
        ("model.max_tiles=0", "at least 1", "0"),
        ("prune.gamma_scale=papr", "released, paper or trace", "'papr'"),
        ("cost.usd_per_hour=-1", "at least 0", "-1"),
        ("unit.images=1" + "0" * 400, "at least 1 and at most 4096", "1" + "0" * 400),
        ("prune.retention=1" + "0" * 400, "a number above 0 and at most 1, or null", "1" + "0" * 400),
    ],
)
def test_a_value_that_a_key_does_not_take_is_quoted_with_what_the_key_must_be(override, expected, got):
    name = ".".join(override.partition("=")[0].split(".")[:2])
    assert error_of(override) == f"{name} must be {expected}, got {got}"


def test_a_section_given_a_value_is_named(tmp_path):
    assert error_of("prune=0.1") == "prune must be a section with keys, got 0.1"
    assert error_of("--config", yaml_file(tmp_path, "prune: [1]\n")) == "prune must be a section with keys, got [1]"


def test_values_of_a_section_may_be_given_at_once():
    assert load_config(["prune={retention: 0.3, seed: 4}"]) == load_config(["prune.retention=0.3", "prune.seed=4"])
    assert error_of("prune={retentoin: 0.3}") == "unknown key prune.retentoin; did you mean prune.retention?"
    assert error_of("prune={settings.layer: 3}").startswith("unknown key prune.settings.layer")


def test_names_below_a_key_are_merged_into_what_was_there():
    config = load_config([OWN_MODEL, "prune.settings={a: {b: 1}}", "prune.settings.a.c=2", "prune.settings.d=[1]"])
    assert config.prune.settings == {"a": {"b": 1, "c": 2}, "d": [1]}
    assert with_values(config, {"prune.settings.a": 3}).prune.settings == {"a": 3, "d": [1]}
    assert with_values(config, {"prune.settings.d": {"e": 1}}).prune.settings["d"] == {"e": 1}


def test_numbers_and_text_are_read_from_each_other():
    config = load_config(
        [OWN_MODEL, "unit.images='5'", "prune.retention=1", "prompt.more=[1, yes]", "ray.dashboard=on"]
    )
    assert (config.unit.images, config.prompt.more, config.ray.dashboard) == (5, ["1", "True"], True)
    assert isinstance(config.prune.retention, float)


def test_values_may_refer_to_other_keys_and_to_the_environment(monkeypatch):
    monkeypatch.setenv("BUCKET", "s3://bucket")
    config = load_config([OWN_MODEL, "input.path=${oc.env:BUCKET}/in", "output.path=${input.path}/out"])
    assert config.output.path == "s3://bucket/in/out"
    assert error_of("input.path=${nope}") == "input.path must resolve to a value: Interpolation key 'nope' not found"
    assert error_of("input.path=${").startswith("input.path must resolve to a value: ")
    assert error_of("unit.images=[").startswith("unit.images must be valid YAML, got '[': ")


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


def test_the_resolved_configuration_as_yaml_loads_as_itself(tmp_path):
    config = load_config(["prompt.template=Q: {title} #1", "prompt.more=['yes', '{x}']", "prune.gamma=null"])
    assert load_config(["--config", yaml_file(tmp_path, to_yaml(config))]) == config


def test_a_loaded_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        load_config([]).prune.retention = 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_the_defaults_keep_to_their_own_bounds():
    assert checked(asdict(Config()), Config) == Config()


def test_nothing_is_read_from_the_environment(monkeypatch):
    before = load_config([])
    for name in KEYS:
        monkeypatch.setenv(name.upper().replace(".", "_"), "1")
        monkeypatch.setenv(f"OTPRUNE_{name.upper().replace('.', '_')}", "1")
    assert load_config([]) == before
