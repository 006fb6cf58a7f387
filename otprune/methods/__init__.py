"""The pruning methods of the comparison, one record each; `base.py` defines the records.

To add a method, write one file with its record, then import the record here and list it in METHODS.
"""

from otprune.methods.adaptive import METHOD as LOGDET_ADAPTIVE
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
from otprune.methods.resize import METHOD as RESIZE
from otprune.methods.salient.logdet import METHOD as LOGDET_SALIENT
from otprune.methods.salient.scope import METHOD as SCOPE
from otprune.methods.salient.score import METHOD as SCORE
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
"""The method that keeps every token: the reference of every comparison."""

BASELINES = (RANDOM.name, UNIFORM.name)
"""The methods that any other must beat at equal budgets."""


def collect(*methods: Method) -> dict[str, Method]:
    """Name -> method, in the order given.

    Raises:
        ValueError: if two methods have the same name.
    """
    collected: dict[str, Method] = {}
    for method in methods:
        if method.name in collected:
            raise ValueError(f"methods must have different names, got {method.name!r} twice")
        collected[method.name] = method
    return collected


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
    RESIZE,
    LOGDET_ADAPTIVE,
    LOGDET_SALIENT,
    SCOPE,
    SCORE,
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
    """The record that METHODS holds under a name; a record is returned as it is.

    Raises:
        ValueError: for a name that is not in METHODS.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]
