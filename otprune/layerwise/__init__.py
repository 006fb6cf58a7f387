"""Pruning inside the language model: one executor (`executor.py`) runs the policies (`policy.py`) of all methods."""

from otprune.layerwise.executor import generate_layerwise, prefill_logits
from otprune.layerwise.policy import KeepAll, Policy, State

__all__ = ["KeepAll", "Policy", "State", "generate_layerwise", "prefill_logits"]
