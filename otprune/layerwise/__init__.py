"""Pruning inside the language model: FastV, VTW, FitPrune and PyramidDrop on one executor (`executor.py`).

A policy is made from the settings that `otprune.schedules` and `otprune.flops` know its method by:
`POLICIES["fastv"](layer=3, kept=1)`.
"""

from collections.abc import Callable

from otprune.layerwise.executor import generate_layerwise, prefill_logits
from otprune.layerwise.fastv import FastV
from otprune.layerwise.fitprune import LLAVA_15_7B_RECIPES, FitPrune
from otprune.layerwise.fitprune_fit import fit_fitprune
from otprune.layerwise.policy import KeepAll, Policy, State
from otprune.layerwise.pyramiddrop import PyramidDrop, pyramid_stages
from otprune.layerwise.vtw import VTW
from otprune.layerwise.vtw_search import find_vtw_layer, vtw_divergences

POLICIES: dict[str, Callable[..., Policy]] = {
    "fastv": FastV,
    "vtw": VTW,
    "fitprune": FitPrune,
    "pyramiddrop": PyramidDrop,
}

__all__ = [
    "LLAVA_15_7B_RECIPES",
    "POLICIES",
    "VTW",
    "FastV",
    "FitPrune",
    "KeepAll",
    "Policy",
    "PyramidDrop",
    "State",
    "find_vtw_layer",
    "fit_fitprune",
    "generate_layerwise",
    "prefill_logits",
    "pyramid_stages",
    "vtw_divergences",
]
