"""Reducers: fewer visual tokens whose features are new, made of several old ones."""

from otprune.reducers.m3 import m3_grids, m3_pool
from otprune.reducers.prumerge import Merged, prumerge

__all__ = ["Merged", "m3_grids", "m3_pool", "prumerge"]
