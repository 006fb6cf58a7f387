"""A method's own settings: their descriptions, and the check of a user's values against them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting: its meaning, kind, default and bounds (`low` <= value <= `high`, value < `below`).

    A setting of kind `counts` is {layer: number of tokens}. A setting of a kind `or file` may name a file written by
    jobs/calibrate.py, which holds the value.
    """

    meaning: str
    kind: Literal["integer", "number", "flag", "text", "counts", "counts or file", "number or file"]
    default: Any = None
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    schedules: bool = True
    """For a method inside the model: whether the setting decides how many tokens each layer processes."""


PRECISION = Setting(
    meaning="float32, or released: rounded to float16 where the released code is, to compare with published numbers",
    kind="text",
    default="float32",
    choices=("float32", "released"),
)
"""Of the selectors whose release runs in float16 (`otprune.half_precision`)."""


def check_settings(method: str, known: Mapping[str, Setting], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of `known`, given or default; layers that are text, as in JSON, become integers.

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
            has_kind = isinstance(value, bool)
        case "integer":
            has_kind = isinstance(value, int) and not isinstance(value, bool)
        case "number":
            has_kind = isinstance(value, (int, float)) and not isinstance(value, bool)
        case "text":
            has_kind = isinstance(value, str)
        case "counts":
            has_kind = isinstance(value, Mapping)
        case "counts or file":
            has_kind = isinstance(value, (Mapping, str))
        case "number or file":
            has_kind = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if not has_kind:
        raise ValueError(f"{key} must be {_KIND_NAMES[setting.kind]}, got {value!r}")
    if isinstance(value, Mapping):
        return _counts(key, value)
    if setting.choices and value not in setting.choices:
        raise ValueError(f"{key} must be one of {', '.join(setting.choices)}, got {value!r}")
    if isinstance(value, str):
        return value
    # `not value >= low` instead of `value < low`, so that NaN is refused.
    if setting.low is not None and not value >= setting.low:
        raise ValueError(f"{key} must be at least {setting.low:g}, got {value}")
    if setting.high is not None and not value <= setting.high:
        raise ValueError(f"{key} must be at most {setting.high:g}, got {value}")
    if setting.below is not None and not value < setting.below:
        raise ValueError(f"{key} must be below {setting.below:g}, got {value}")
    return value


_KIND_NAMES = {
    "flag": "true or false",
    "integer": "an integer",
    "number": "a number",
    "text": "text",
    "counts": "{layer: number of tokens}",
    "counts or file": "{layer: number of tokens} or a file",
    "number or file": "a number or a file",
}


def _counts(key: str, value: Mapping[Any, Any]) -> dict[int, int]:
    """{layer: number}, by ascending layer. Layers may be text, because the keys of JSON objects are.

    Raises:
        ValueError: if a layer or a number is not an integer of at least 0.
    """
    counts = {}
    for layer, number in value.items():
        is_count = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if not (str(layer).isdecimal() and is_count):
            raise ValueError(f"{key} must be {{layer: number of tokens}}, got {layer!r}: {number!r}")
        counts[int(layer)] = number
    return dict(sorted(counts.items()))
