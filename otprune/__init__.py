"""OTPrune visual-token pruning: which tokens of an image to keep."""

from otprune.select import METHODS, num_kept, select_tokens

__all__ = ["METHODS", "num_kept", "select_tokens"]

__version__ = "0.1.0"
