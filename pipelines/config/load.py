"""Loads the configuration of a job: defaults < YAML file < key=value arguments, merged by OmegaConf.

OmegaConf merges plain values and resolves `${...}`; `pipelines.config.check` then checks types and bounds. OmegaConf's
own typed merge is not used: its errors do not always name the key, it accepts a list of lists as a list of text, and it
raises a bare TypeError when a list replaces a mapping.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipelines.config.check import checked, shown
from pipelines.config.keys import Config
from pipelines.config.schema import keys_of, sections_of
from pipelines.errors import UserError
from pipelines.secrets import public
from pipelines.text import clean

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_CONFIG = REPOSITORY / "conf" / "demo.yaml"

C = TypeVar("C", bound=Config)


def load_config(argv: Sequence[str], schema: type[C] = Config, demo: Path = DEMO_CONFIG) -> C:
    """The configuration for `[--config FILE] [dotted.key=value ...]`.

    Without --config and model.path, the file `demo` is loaded, because its settings belong to the demo model. Values
    are YAML, except those of text keys: `yes`, `#` and braces stay as typed.

    Raises:
        UserError: unknown key (with the nearest one), wrong type, value out of bounds, unreadable file.
    """
    file, overrides = _split(argv)
    if file is None and not any(o.startswith("model.path=") for o in overrides):
        file = demo
    given = _of_file(file, schema) if file is not None else []
    return _merged(schema(), [*given, *(_of_override(override, schema) for override in overrides)])


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """A copy of the configuration with new values for some dotted keys.

    Raises:
        UserError: as `load_config`.
    """
    return _merged(config, values.items())


def read_yaml(file: Path, key: str) -> dict[Any, Any]:
    """The mapping in a YAML file. Errors name `key`, the key or option whose value the file is.

    Raises:
        UserError: if there is no such file, or it does not hold a mapping.
    """
    if not file.is_file():
        raise UserError(f"{key} must name a YAML file, found none at {file}")
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} must be readable YAML: {clean(str(error))}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{file} must hold sections with keys, got {type(loaded).__name__}")
    return OmegaConf.to_container(loaded)  # pyright: ignore[reportReturnType] - a mapping


def to_yaml(config: Config) -> str:
    """The configuration as YAML for people, without its secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(public(asdict(config))))


def _split(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    file, overrides, rest = None, [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or (rest.pop(0) if rest else "")
            if not value:
                raise UserError("--config must be followed by a YAML file")
            file = Path(value)
        elif "=" in argument and not argument.startswith("-"):
            overrides.append(argument)
        else:
            raise UserError(f"arguments must be --config FILE or dotted.key=value, got {argument!r}")
    return file, overrides


def _of_file(file: Path, schema: type[Config]) -> Iterable[tuple[str, Any]]:
    loaded = read_yaml(file, "--config")
    for name in loaded:
        if name in keys_of(schema) and "." in name:
            section, _, leaf = name.partition(".")
            raise UserError(f"unknown key {name}; in YAML it is the key {leaf} of the section {section}")
        if "." in str(name):
            raise _unknown(name, schema)
    return loaded.items()


def _of_override(override: str, schema: type[Config]) -> tuple[str, Any]:
    """Key and value of `key=value`. The value of a text key is parsed as YAML only if it is quoted, or null if that is
    allowed."""
    name, _, text = override.partition("=")
    kind = keys_of(schema)[name].kind if name in keys_of(schema) else None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    null = kind == str | None and text in ("", "null")
    if kind in (str, str | None) and not quoted and not null:
        return name, text
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{name} must be valid YAML, got {text!r}: {clean(str(error))}") from error
    return name, parsed["value"]


def _merged(config: C, given: Iterable[tuple[str, Any]]) -> C:
    """The checked configuration with the given values of keys and sections."""
    schema, name = type(config), ""
    # A plain mapping, not OmegaConf.structured: the typed merge would report its own errors before `checked`.
    merged = OmegaConf.create(asdict(config))
    try:
        for name, value in _by_key(given, schema):
            before = OmegaConf.select(merged, name, throw_on_resolution_failure=False)
            both = OmegaConf.is_dict(before) and isinstance(value, Mapping)  # lists and values replace
            OmegaConf.update(merged, name, value, merge=both)
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or name} must resolve to a value: {clean(str(error))}") from error
    return checked(values, schema)


def _by_key(given: Iterable[tuple[str, Any]], schema: type[Config]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs: a section is flattened to its keys, and an empty section gives none.

    A name may go on below a key whose value is a mapping: prune.settings.layer.
    """
    known, sections = keys_of(schema), sections_of(schema)
    for name, value in given:
        if name not in sections:
            if not any(name == key or str(name).startswith(f"{key}.") for key in known):
                raise _unknown(name, schema)
            yield name, value
        elif isinstance(value, Mapping):
            if unknown := [leaf for leaf in value if f"{name}.{leaf}" not in known]:
                raise _unknown(f"{name}.{unknown[0]}", schema)
            yield from ((f"{name}.{leaf}", inner) for leaf, inner in value.items())
        elif value is not None:
            raise UserError(f"{name} must be a section with keys, got {shown(value)}")


def _unknown(name: object, schema: type[Config]) -> UserError:
    """The error for an unknown key. It names the nearest key, preferring keys that end with the same word."""
    word = str(name).rpartition(".")[2]
    known = [*keys_of(schema), *sections_of(schema)]
    same = [key for key in known if key.rpartition(".")[2] == word]
    near = difflib.get_close_matches(str(name), same or known, n=1, cutoff=0.0 if same else 0.5)
    return UserError(f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists the keys"))
