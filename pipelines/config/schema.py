"""The building blocks of a configuration: keys in sections, each key with its type, default, bounds and meaning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, get_type_hints


def key(meaning: str, default: Any = None, **bounds: float) -> Any:
    """A configuration field. `bounds` are `low` and `high`, which are inclusive, and `above`, which is exclusive."""
    metadata = {"meaning": meaning, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Key:
    name: str  # dotted, e.g. prune.retention
    kind: Any  # the declared type
    meaning: str
    bounds: Mapping[str, float]


class Sections:
    """A configuration: a dataclass whose fields are sections (dataclasses of keys) or keys without a section."""

    __slots__ = ()

    def dotted(self) -> dict[str, Any]:
        """Every key by its dotted name, e.g. {"prune.retention": 0.098}; keys without a section come first."""
        return {name: attrgetter(name)(self) for name in keys_of(type(self))}


@cache
def keys_of(schema: type) -> dict[str, Key]:
    """Every key by its dotted name. Keys without a section come first."""
    hints = get_type_hints(schema)
    keys = [_key(k.name, hints[k.name], k) for k in fields(schema) if k.name not in sections_of(schema)]
    for section, kind in sections_of(schema).items():
        own = get_type_hints(kind)
        keys += [_key(f"{section}.{k.name}", own[k.name], k) for k in fields(kind)]
    return {k.name: k for k in keys}


@cache
def sections_of(schema: type) -> dict[str, type]:
    """The dataclass of every section by its name. The docstring of the dataclass says what the section is for."""
    return {
        name: kind for name, kind in get_type_hints(schema).items() if isinstance(kind, type) and is_dataclass(kind)
    }


def _key(name: str, kind: Any, declared: Any) -> Key:
    return Key(name, kind, declared.metadata["meaning"], declared.metadata["bounds"])
