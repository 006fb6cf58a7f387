"""A method's own settings: what each means, and the check of what a user gave."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting: its meaning, its type (`counts` is {layer: number of tokens}), bounds, and default.

    A setting of the type `counts or file` may name a file of jobs/calibrate.py, which holds its value.
    """

    meaning: str
    kind: Literal["integer", "number", "flag", "text", "counts", "counts or file"]
    default: Any = None
    low: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()


def check_settings(method: str, known: Mapping[str, Setting], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of `known`, as given or by default, in its type; integer layers for text ones.

    Raises:
        ValueError: an unknown setting, a wrong type, or a value out of bounds.
    """
    if unknown := [key for key in given if key not in known]:
        takes = f"one of {', '.join(known)}" if known else "absent"
        raise ValueError(f"settings of {method} must be {takes}, got {unknown[0]!r}")
    return {key: _checked(f"settings.{key}", setting, given.get(key)) for key, setting in known.items()}


def _checked(key: str, setting: Setting, value: Any) -> Any:
    if value is None:
        return setting.default
    match setting.kind:
        case "flag":
            right = isinstance(value, bool)
        case "integer":
            right = isinstance(value, int) and not isinstance(value, bool)
        case "number":
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
        case "text":
            right = isinstance(value, str)
        case "counts":
            right = isinstance(value, Mapping)
        case "counts or file":
            right = isinstance(value, (Mapping, str))
    if not right:
        raise ValueError(f"{key} must be {_WORDS[setting.kind]}, got {value!r}")
    if isinstance(value, Mapping):
        return _counts(key, value)
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{key} must be one of {', '.join(setting.choices)}, got {value!r}")
    if setting.low is not None and not value >= setting.low:
        raise ValueError(f"{key} must be at least {setting.low:g}, got {value}")
    if setting.below is not None and not value < setting.below:
        raise ValueError(f"{key} must be below {setting.below:g}, got {value}")
    return value


_WORDS = {
    "flag": "true or false",
    "integer": "an integer",
    "number": "a number",
    "text": "text",
    "counts": "{layer: number of tokens}",
    "counts or file": "{layer: number of tokens} or a file",
}


def _counts(key: str, value: Mapping[Any, Any]) -> dict[int, int]:
    """Layers as integers (JSON has text alone for keys), ascending.

    Raises:
        ValueError: if a layer or number is no integer of at least 0.
    """
    counts = {}
    for layer, number in value.items():
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if not (str(layer).isdecimal() and whole):
            raise ValueError(f"{key} must be {{layer: number of tokens}}, got {layer!r}: {number!r}")
        counts[int(layer)] = number
    return dict(sorted(counts.items()))
