"""No pruning, but a smaller picture: the baseline that pruning must beat where pictures have free size.

A picture is scaled down, or cut into fewer tiles, until the vision tower gives about `retention` of its visual tokens
(`Geometry.shrunk`), and every token is kept. The tower, too, has less to do, which no method saves that prunes behind
it.
"""

from otprune.methods.base import Reducer
from otprune.methods.reduction import keep_all

METHOD = Reducer(
    name="resize",
    reduce=keep_all,
    cost=lambda num_tokens, width, kept, on_cpu: 0,
    keeps_all=True,
    keeps_grid=True,
    sends_smaller=True,
)
