"""Visual-token pruning: `select_tokens` chooses which visual tokens of an image the language model reads.

The names are loaded when they are first used: what tasks on CPUs need, such as `otprune.families`, loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otprune.select import METHODS, num_kept, select_tokens

__all__ = ["METHODS", "num_kept", "select_tokens"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from otprune import select  # imports torch

    return getattr(select, name)
