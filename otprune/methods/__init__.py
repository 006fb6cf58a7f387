"""Every pruning method of the comparison: where it acts, what it needs of the encoder, what it can be told.

Kinds:
    none       every visual token is decoded
    selector   keeps k of N tokens before the language model
    reducer    makes new tokens out of several before the language model
    in_llm     deletes tokens while the language model reads its prompt: the decoder must be run layer by layer

Methods that are told nothing but a budget take `retention`; a method's own settings override what follows from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["none", "selector", "reducer", "in_llm"]
Requirement = Literal["keys", "class_attention", "relevance"]
"""Beside projected features: keys and the class token's attention of the vision layer that reads the features; the
relevance of each token to the prompt, which makes the selection depend on the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting: its meaning, its type (`counts` is {layer: number of tokens}), bounds, and default."""

    meaning: str
    kind: Literal["integer", "number", "flag", "text", "counts", "counts or file"]
    default: Any = None
    low: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a job has to know of a method before it runs one."""

    kind: Kind
    requires: frozenset[Requirement] = frozenset()
    settings: Mapping[str, Setting] = field(default_factory=dict)


_MERGES = frozenset[Requirement](("keys", "class_attention"))

METHODS: dict[str, Method] = {
    "none": Method(kind="none"),
    **dict.fromkeys(
        (
            *("otprune", "otprune_centered", "logdet_linear", "logdet_linear_centered", "divprune"),
            *("random", "uniform", "first", "last"),
        ),
        Method(kind="selector"),
    ),
    "cdpruner": Method(
        kind="selector",
        requires=frozenset(("relevance",)),
        settings={
            "relevance": Setting(
                meaning="to the prompt's CLIP text embedding, to its word embeddings in the language model, or none",
                kind="text",
                default="clip",
                choices=("clip", "words", "none"),
            ),
            "clip": Setting(meaning="CLIP checkpoint whose vision tower the model has", kind="text"),
            "theta": Setting(
                meaning="weight of relevance against diversity; null uses relevance itself",
                kind="number",
                low=0,
                below=1,
            ),
        },
    ),
    "m3": Method(
        kind="reducer",
        settings={
            "grid": Setting(
                meaning="side of the pooled grid; null is the smallest with retention's number of tokens or more",
                kind="integer",
                low=1,
            )
        },
    ),
    "prumerge": Method(
        kind="reducer",
        requires=_MERGES,
        settings={
            "adaptive": Setting(
                meaning="each image's number of tokens by the outliers of its attention, not by retention",
                kind="flag",
                default=False,
            )
        },
    ),
    "prumerge_plus": Method(kind="reducer", requires=_MERGES),
    "fastv": Method(
        kind="in_llm",
        settings={
            "layer": Setting(
                meaning="layers before this one see every token; null is 2, or 1 where 2 cost more than the budget",
                kind="integer",
                low=1,
            ),
            "kept": Setting(meaning="tokens from this layer on; null matches retention's FLOPs", kind="integer", low=1),
        },
    ),
    "vtw": Method(
        kind="in_llm",
        settings={
            "layer": Setting(
                meaning="layers before this one see every token, the others none; null matches retention's FLOPs",
                kind="integer",
                low=0,
            )
        },
    ),
    "fitprune": Method(
        kind="in_llm",
        settings={
            "recipe": Setting(
                meaning="{layer: tokens that leave after it}, or the file of jobs/calibrate.py", kind="counts or file"
            )
        },
    ),
    "pyramiddrop": Method(
        kind="in_llm",
        settings={
            "stages": Setting(
                meaning="{layer: tokens from it on}; null thins out at the quarters, matching retention's FLOPs",
                kind="counts",
            )
        },
    ),
}
"""Name -> method, in the order of the comparison."""


def get_method(name: str) -> Method:
    """Raises ValueError for a name that is not in METHODS."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def check_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the method, as given or by default, in its type; integer layers for text ones.

    Raises:
        ValueError: an unknown method or setting, a wrong type, or a value out of bounds.
    """
    known = get_method(name).settings
    if unknown := [key for key in given if key not in known]:
        takes = f"one of {', '.join(known)}" if known else "absent"
        raise ValueError(f"settings of {name} must be {takes}, got {unknown[0]!r}")
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
