"""Every pruning method of the comparison, one record each: `base.py` says what a record holds.

A new method is one file with its record, and here its import and its place in METHODS.
"""

from otprune.methods.base import BeforeModel, InModel, Method, Reducer, Sample, Selector
from otprune.methods.cdpruner import METHOD as CDPRUNER
from otprune.methods.divprune import METHOD as DIVPRUNE
from otprune.methods.fastv import METHOD as FASTV
from otprune.methods.fitprune import METHOD as FITPRUNE
from otprune.methods.logdet_linear import LOGDET_LINEAR, LOGDET_LINEAR_CENTERED
from otprune.methods.m3 import METHOD as M3
from otprune.methods.none import METHOD as NONE
from otprune.methods.otprune import OTPRUNE, OTPRUNE_CENTERED
from otprune.methods.positional import FIRST, LAST, RANDOM, UNIFORM
from otprune.methods.prumerge import PRUMERGE, PRUMERGE_PLUS
from otprune.methods.pyramiddrop import METHOD as PYRAMIDDROP
from otprune.methods.settings import Setting
from otprune.methods.vtw import METHOD as VTW

__all__ = [
    "BASELINES",
    "METHODS",
    "UNPRUNED",
    "BeforeModel",
    "InModel",
    "Method",
    "Reducer",
    "Sample",
    "Selector",
    "Setting",
    "collect",
    "get_method",
]

UNPRUNED = NONE.name
"""Every token kept: what any method is held against."""

BASELINES = (RANDOM.name, UNIFORM.name)
"""What a method has to beat at equal budgets."""


def collect(*methods: Method) -> dict[str, Method]:
    """Name -> method, in the order given.

    Raises:
        ValueError: if two have one name.
    """
    found: dict[str, Method] = {}
    for method in methods:
        if method.name in found:
            raise ValueError(f"methods must have different names, got {method.name!r} twice")
        found[method.name] = method
    return found


METHODS = collect(
    NONE,
    OTPRUNE,
    OTPRUNE_CENTERED,
    LOGDET_LINEAR,
    LOGDET_LINEAR_CENTERED,
    DIVPRUNE,
    RANDOM,
    UNIFORM,
    FIRST,
    LAST,
    CDPRUNER,
    M3,
    PRUMERGE,
    PRUMERGE_PLUS,
    FASTV,
    VTW,
    FITPRUNE,
    PYRAMIDDROP,
)
"""Name -> method, in the order of the comparison."""


def get_method(method: str | Method) -> Method:
    """The record of a name in METHODS; a record is its own.

    Raises:
        ValueError: for a name that is not in METHODS.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]
