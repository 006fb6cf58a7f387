"""Checks merged values against the keys of a configuration, and describes what a key must be."""

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from pipelines.config.keys import Config
from pipelines.config.schema import Key, keys_of, sections_of
from pipelines.errors import UserError

C = TypeVar("C", bound=Config)

YES, NO = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")  # YAML 1.1 booleans, also if quoted
# Types that are read as a number. An int is not read from a float, so no fraction is rounded. A bool is not read as a
# number, though it is an int in Python: true is not 1.
NUMBERS = {int: (int, str), float: (int, float, str)}
# Names of the types in errors and in --help: of one value, and of the values of a list.
ONE = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "any YAML"}
MANY = {str: "text", int: "whole numbers", float: "numbers", bool: "true or false", Any: "any YAML"}


def checked(values: Mapping[str, Any], schema: type[C]) -> C:
    """The configuration with `values`: {section: {key: value}}, and {key: value} for keys without a section.

    Raises:
        UserError: for the first value of a wrong type or out of bounds.
    """
    keys, sections = keys_of(schema), sections_of(schema)
    parts = {
        name: sections[name](**{leaf: _checked(keys[f"{name}.{leaf}"], value) for leaf, value in part.items()})
        if name in sections
        else _checked(keys[name], part)
        for name, part in values.items()
    }
    return schema(**parts)


def describe(key: Key) -> str:
    """The values that the key takes, e.g. `a whole number of at least 1, or null`."""
    optional = get_origin(key.kind) is UnionType
    kind, bounds = _words(get_args(key.kind)[0] if optional else key.kind), _bounds(key)
    bounded = f"{kind} {bounds}" if bounds.startswith("above") else f"{kind} of {bounds}" if bounds else kind
    return bounded + (", or null" if bounds else " or null") * optional


def shown(value: Any) -> str:
    """The value in YAML's spelling, for error messages."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _checked(key: Key, value: Any) -> Any:
    try:
        fitting = _fitting(value, key.kind)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{key.name} must be {describe(key)}, got {shown(value)}") from error
    if isinstance(fitting, float) and not math.isfinite(fitting):
        raise UserError(f"{key.name} must be a finite number, got {fitting}")
    if key.bounds and fitting is not None and not _within(fitting, **key.bounds):
        raise UserError(f"{key.name} must be {_bounds(key)}, got {shown(value)}")
    return fitting


def _within(value: float, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> bool:
    return low <= value <= high and above < value


def _fitting(value: Any, kind: Any) -> Any:
    """`value` converted to the type `kind`. A quoted number becomes a number; a number becomes text for a text key.

    Raises:
        ValueError: if `value` does not have that type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (origin is Literal and value in inner):
        return value
    if origin is UnionType:
        return None if value is None else _fitting(value, inner[0])
    if origin is list and isinstance(value, list):
        return [_fitting(item, inner[0]) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return value
    if kind is str and not isinstance(value, (list, dict, type(None))):
        return str(value)
    if kind is bool and str(value).lower() in YES + NO:
        return str(value).lower() in YES
    if kind in NUMBERS and type(value) in NUMBERS[kind]:
        return kind(value)
    raise ValueError(f"{value!r} is not {kind}")


def _words(kind: Any, words: Mapping[Any, str] = ONE) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"{', '.join(inner[:-1])} or {inner[-1]}"
    if origin is list:
        return f"{'a list' if words is ONE else 'lists'} of {_words(inner[0], MANY)}"
    return "names with values" if origin is dict else words[kind]


def _bounds(key: Key) -> str:
    bounds = key.bounds
    low = f"at least {bounds['low']}" if "low" in bounds else f"above {bounds['above']}" if "above" in bounds else ""
    high = f"at most {bounds['high']}" if "high" in bounds else ""
    return " and ".join(part for part in (low, high) if part)
