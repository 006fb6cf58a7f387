"""No pruning: the language model reads every visual token."""

from otprune.methods.base import Counting, Reducer
from otprune.methods.reduction import keep_all

METHOD = Reducer(
    name="none",
    reduce=keep_all,
    cost=lambda num_tokens, width, kept, on_cpu: 0,
    counting=Counting(names=(), num_tokens=lambda num_visual: num_visual, of_means=lambda kept, visual: {}),
    keeps_all=True,
    keeps_grid=True,
)
