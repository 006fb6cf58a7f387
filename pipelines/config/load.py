"""From the command line to a checked configuration: merging, errors that name the key, and --help."""

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipelines.config.keys import Config
from pipelines.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_CONFIG = REPOSITORY / "conf" / "demo.yaml"

C = TypeVar("C", bound=Config)


def load_config(argv: Sequence[str], schema: type[C] = Config, demo: Path = DEMO_CONFIG) -> C:
    """The configuration for `[--config FILE] [dotted.key=value ...]`.

    Without --config and without model.path the demo configuration is the base, since its settings
    belong to the demo model. Values are YAML, but text is text: `yes`, `#` and braces stay as they are.

    Raises:
        UserError: unknown key (with the nearest one), wrong type, value out of bounds, unreadable file.
    """
    file, overrides = _split(argv)
    if file is None and not any(o.startswith("model.path=") for o in overrides):
        file = demo
    config = OmegaConf.structured(schema)
    try:
        if file is not None:
            config = OmegaConf.merge(config, _sections(_load_yaml(file, "--config"), schema))
        given = OmegaConf.from_dotlist([_keep_text(override, schema) for override in overrides])
        config = OmegaConf.merge(config, _sections(given, schema))
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error
    except YAMLError as error:
        raise UserError(f"a value of {' '.join(overrides)} is not valid YAML: {_first_line(error)}") from error
    assert isinstance(loaded, schema)
    check_bounds(loaded)
    return loaded


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with other values of some dotted keys.

    Raises:
        UserError: as `load_config`.
    """
    schema = type(config)
    given = OmegaConf.create({})
    try:
        for name, value in values.items():
            OmegaConf.update(given, name, value, merge=False)
        merged = OmegaConf.merge(OmegaConf.structured(config), _sections(given, schema))
        changed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, schema)) from error
    assert isinstance(changed, schema)
    check_bounds(changed)
    return changed


def check_bounds(config: Config) -> None:
    """Raises UserError for the first value outside the bounds of its key."""
    for name, k, value in config.walk():
        bounds = k.metadata
        if value is None or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value}")
        too_low = ("low" in bounds and value < bounds["low"]) or ("above" in bounds and value <= bounds["above"])
        if too_low or ("high" in bounds and value > bounds["high"]):
            raise UserError(f"{name} must be {_describe(bounds)}, got {value}")


def help_text(usage: str, schema: type[Config] = Config, without: Collection[str] = ()) -> str:
    """`usage` followed by every key with its type, default and one-line meaning."""
    lines = [usage.strip(), "", "Keys:"]
    for name, k, default in schema().walk():
        if name in without:
            continue
        kind = _describe_type(_type_of(name, schema))
        shown = "null" if default is None else repr(default) if isinstance(default, str) else default
        lines.append(f"  {name:<28} {k.metadata['meaning']}  [{kind}, default {shown}]")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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


def read_yaml(file: Path, key: str) -> dict[Any, Any]:
    """The mapping in a YAML file that `key` names.

    Raises:
        UserError: if there is no such file, or it holds something else.
    """
    return OmegaConf.to_container(_load_yaml(file, key))  # pyright: ignore[reportReturnType] - a mapping


def _load_yaml(file: Path, key: str) -> Any:
    if not file.is_file():
        raise UserError(f"{key} must name a YAML file, found none at {file}")
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} must be readable YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{file} must hold sections with keys, got {type(loaded).__name__}")
    return loaded


def _sections(given: Any, schema: type[Config]) -> Any:
    """What was given, without sections that are left empty.

    Raises:
        UserError: if a section holds anything but keys.
    """
    default = schema()
    known = {f.name for f in fields(schema) if is_dataclass(getattr(default, f.name))}
    for name in [name for name in given if name in known and given[name] is None]:
        del given[name]
    if wrong := [name for name in given if name in known and not OmegaConf.is_dict(given[name])]:
        raise UserError(f"{wrong[0]} must be a section with keys, got {given[wrong[0]]}")
    return given


def _keep_text(override: str, schema: type[Config]) -> str:
    """`key=value` with the value of a text key in quotes, unless it is quoted already or is the null of an optional."""
    name, _, value = override.partition("=")
    kind = _type_of(name, schema)
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or kind not in (str, str | None) or (kind == str | None and value in ("", "null")):
        return override
    return f"{name}={json.dumps(value, ensure_ascii=False)}"


def _type_of(name: str, schema: type[Config]) -> Any:
    """The declared type of a dotted key; None if there is no such key."""
    top, _, leaf = name.partition(".")
    kind = get_type_hints(schema).get(top)
    return get_type_hints(kind).get(leaf) if is_dataclass(kind) else None if leaf else kind


def _describe_type(kind: Any) -> str:
    return str(kind).removeprefix("<class '").removesuffix("'>").replace("typing.", "")


def _explain(error: OmegaConfBaseException, schema: type[Config]) -> str:
    name = error.full_key or ""
    if "not in '" in str(error):
        known = [*schema().dotted(), *(f.name for f in fields(schema))]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys"
        if name in known:
            section, _, leaf = name.partition(".")
            hint = f"; in YAML it is the key {leaf} of the section {section}"
        return f"unknown key {name}{hint}"
    problem = _first_line(error)
    if kind := _type_of(name, schema):
        return f"{name} must be {_describe_type(kind)}: {problem}"
    return f"{name}: {problem}" if name else problem


def _describe(bounds: Any) -> str:
    low = f"at least {bounds['low']}" if "low" in bounds else f"above {bounds['above']}" if "above" in bounds else ""
    high = f"at most {bounds['high']}" if "high" in bounds else ""
    return " and ".join(part for part in (low, high) if part)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
