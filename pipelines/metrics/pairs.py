"""Checks the input of a caption score: one candidate and at least one reference for each image of the corpus."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def check_pairs(candidates: Mapping[Key, object], references: Mapping[Key, Sequence[object]]) -> None:
    """Raises ValueError unless both have the same ids, at least one, and each id has at least one reference."""
    if not candidates:
        raise ValueError("candidates must hold at least one caption, got none")
    if candidates.keys() != references.keys():
        without = [key for key in candidates if key not in references]
        missing = [key for key in references if key not in candidates]
        raise ValueError(
            "candidates and references must have the same ids, got "
            f"{len(without)} without references {without[:3]} and {len(missing)} without a candidate {missing[:3]}"
        )
    for key, texts in references.items():
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"references of {key!r} must be a list of at least one caption, got {texts!r}")
