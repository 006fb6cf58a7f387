"""Visual-token pruning: `select_tokens` chooses which visual tokens of an image the language model reads."""

from otprune.select import METHODS, num_kept, select_tokens

__all__ = ["METHODS", "num_kept", "select_tokens"]

__version__ = "0.1.0"
