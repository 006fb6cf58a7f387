"""From the command line to a checked `Config`: merging, errors that name the key, and --help."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipelines.config import Config

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_CONFIG = REPOSITORY / "conf" / "demo.yaml"


class UserError(Exception):
    """Something the user can correct: bad configuration, bad input, unwritable output. Jobs exit with code 2."""


def load_config(argv: Sequence[str]) -> Config:
    """The configuration for `[--config FILE] [dotted.key=value ...]`.

    Without --config and without model.path the demo configuration is the base, since its settings
    belong to the demo model.

    Raises:
        UserError: unknown key (with the nearest one), wrong type, value out of bounds, unreadable file.
    """
    file, overrides = _split(argv)
    if file is None and not any(o.startswith("model.path=") for o in overrides):
        file = DEMO_CONFIG
    config = OmegaConf.structured(Config)
    try:
        if file is not None:
            config = OmegaConf.merge(config, _read_yaml(file))
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    except YAMLError as error:
        raise UserError(f"a value of {' '.join(overrides)} is not valid YAML: {_first_line(error)}") from error
    assert isinstance(loaded, Config)
    check_bounds(loaded)
    return loaded


def check_bounds(config: Config) -> None:
    """Raises UserError for the first value outside the bounds of its key."""
    for section in fields(config):
        part = getattr(config, section.name)
        for k in fields(part):
            value, bounds = getattr(part, k.name), k.metadata
            if value is None or not isinstance(value, (int, float)):
                continue
            too_low = ("low" in bounds and value < bounds["low"]) or ("above" in bounds and value <= bounds["above"])
            if too_low or ("high" in bounds and value > bounds["high"]) or value != value:
                raise UserError(f"{section.name}.{k.name} must be {_describe(bounds)}, got {value}")


def help_text(usage: str) -> str:
    """`usage` followed by every key with its type, default and one-line meaning."""
    lines = [usage.strip(), "", "Keys:"]
    for name, default in Config().dotted().items():
        section, leaf = name.split(".")
        part = type(getattr(Config(), section))
        meaning = next(k.metadata["meaning"] for k in fields(part) if k.name == leaf)
        kind = str(get_type_hints(part)[leaf]).removeprefix("<class '").removesuffix("'>").replace("typing.", "")
        shown = "null" if default is None else repr(default) if isinstance(default, str) else default
        lines.append(f"  {name:<28} {meaning}  [{kind}, default {shown}]")
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


def _read_yaml(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"--config must name a YAML file, found none at {file}")
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} must be readable YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{file} must hold sections with keys, got {type(loaded).__name__}")
    return loaded


def _explain(error: OmegaConfBaseException) -> str:
    name = error.full_key or ""
    if "not in '" in str(error):
        known = [*Config().dotted(), *(f.name for f in fields(Config))]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys"
        return f"unknown key {name}{hint}"
    problem = _first_line(error)
    section, _, leaf = name.partition(".")
    part = getattr(Config(), section, None)
    if part is not None and leaf in {f.name for f in fields(part)}:
        kind = str(get_type_hints(type(part))[leaf]).removeprefix("<class '").removesuffix("'>").replace("typing.", "")
        return f"{name} must be {kind}: {problem}"
    return f"{name}: {problem}" if name else problem


def _describe(bounds: Any) -> str:
    low = f"at least {bounds['low']}" if "low" in bounds else f"above {bounds['above']}" if "above" in bounds else ""
    high = f"at most {bounds['high']}" if "high" in bounds else ""
    return " and ".join(part for part in (low, high) if part)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
