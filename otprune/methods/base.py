"""What a pruning method is to the rest of the program: one record, in the method's own file.

Three kinds:
    Selector   keeps k of N tokens before the language model, by their features alone
    Reducer    leaves fewer tokens before the language model by any other rule, among them none at all
    InModel    deletes tokens while the language model reads its prompt: the decoder must be run layer by layer

Whoever asks for a method asks its record: which settings it takes, what it needs of the encoder, what it does to a
picture, what its own work costs, which rows each layer sees, and which of its budgets costs as much as another method.
Methods that are told nothing but a budget take `retention`; a method's own settings override what follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from otprune.choice import Choose, choose_tokens
from otprune.layerwise.policy import Policy
from otprune.methods.reduction import Reduction, Requirement, Seen, keep_all, keep_rows
from otprune.methods.settings import Setting, check_settings
from otprune.schedules import Schedule, num_kept, stage_rows
from otprune.shapes import LanguageShape

Shared = Literal["gamma", "gamma_scale", "seed"]
"""Settings that several methods have under one key each: `prune.gamma` and so on, not `prune.settings.gamma`."""

TokenCost = Callable[[int, int, int, bool], int]
"""(N tokens, their width D, k kept, on a CPU) -> multiply-adds of choosing, of one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """One image in its prompt: the language model, the tokens that a method chooses from, and the rows that it leaves.

    `width` is that of the tokens that are chosen from.
    """

    shape: LanguageShape
    width: int
    num_text: int
    num_visual: int
    rows: Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """How a method before the language model says its number of tokens to `Method.visual_rows`."""

    names: tuple[str, ...]
    num_tokens: Callable[..., int]
    """(N, **settings of these names) -> tokens from layer 0 on."""
    of_means: Callable[[float, float], dict[str, Any]]
    """(mean kept tokens, mean visual tokens) of a finished run -> settings of these names."""


BY_RETENTION = Counting(
    names=("retention",),
    num_tokens=lambda num_visual, retention: num_kept(retention, num_visual),
    of_means=lambda kept, visual: {"retention": min(1.0, kept / max(1.0, visual))},
)
BY_TOKENS = Counting(
    names=("tokens",),
    num_tokens=lambda num_visual, tokens: tokens,
    of_means=lambda kept, visual: {"tokens": min(round(kept), round(visual))},
)
"""For a method whose number of tokens is its own: given as it is, or as a mean over images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """What every kind of method answers."""

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Its own: `prune.settings.<name>`."""
    shared: frozenset[Shared] = frozenset()
    requires: frozenset[Requirement] = frozenset()
    match: Callable[..., dict[str, Any]] | None = None
    """(Search, **settings) -> settings with what is None among them filled in by the search; None: no budget to search.
    It may take keywords beside its settings that narrow the search."""

    inside_model: ClassVar[bool] = False
    keeps_all: bool = False
    """Whether every token goes to the language model, whatever `retention` says."""
    keeps_grid: bool = False
    """Whether what is left of a square picture is a square again, which LLaVA-1.6 can lay out with its neighbours."""
    before_projector: bool = False
    """Whether it works on what the projector reads; what is left is projected afterwards."""

    @property
    def per_prompt(self) -> bool:
        """Whether what is left of a picture depends on the prompt."""
        return "relevance" in self.requires

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting, as given or by default, in its type.

        Raises:
            ValueError: an unknown setting, a wrong type, or a value out of bounds.
        """
        return check_settings(self.name, self.settings, given)

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        """The method, as it acts before the language model, with its checked settings; `shared` has all shared ones."""
        raise NotImplementedError

    def own_flops(self, sizes: Sizes, settings: Mapping[str, Any], *, on_cpu: bool) -> int:
        """Multiply-adds of choosing the tokens of one image; `settings` are those of `visual_rows`."""
        raise NotImplementedError

    @property
    def scheduled_by(self) -> tuple[str, ...]:
        """The settings that `visual_rows` takes."""
        raise NotImplementedError

    def visual_rows(self, num_visual: int, num_layers: int, *, as_released: bool = False, **settings: Any) -> Schedule:
        """Visual tokens in each layer's attention and FFN, as this package runs it, or `as_released`.

        Raises:
            ValueError: on missing or unknown settings, or values out of range.
        """
        if set(settings) != set(self.scheduled_by):
            wanted = list(self.scheduled_by)
            raise ValueError(f"settings of {self.name} must be {wanted}, got {sorted(settings)}")
        if num_visual < 1 or num_layers < 1:
            raise ValueError(f"num_visual and num_layers must be at least 1, got {num_visual} and {num_layers}")
        return self._rows(num_visual, num_layers, as_released, settings)

    def _rows(self, num_visual: int, num_layers: int, as_released: bool, settings: Mapping[str, Any]) -> Schedule:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class BeforeModel(Method):
    """A method that shortens the prompt before the language model reads it."""

    cost: TokenCost
    counting: Counting = BY_RETENTION

    def own_flops(self, sizes: Sizes, settings: Mapping[str, Any], *, on_cpu: bool) -> int:
        kept, _ = sizes.rows[0]
        return self.cost(sizes.num_visual, sizes.width, kept, on_cpu)

    @property
    def scheduled_by(self) -> tuple[str, ...]:
        return self.counting.names

    def _rows(self, num_visual: int, num_layers: int, as_released: bool, settings: Mapping[str, Any]) -> Schedule:
        return stage_rows(num_visual, num_layers, {0: self.counting.num_tokens(num_visual, **settings)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Selector(BeforeModel):
    """Keeps k of N tokens by their features alone."""

    choose: Callable[..., Tensor]
    """(features [B, N, D], k, **settings, **shared ones that it takes) -> int64 [B, k] of distinct token indices."""

    def bind(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Choose:
        """`choose` with its settings, and of `shared` those that the method takes."""
        told = {name: value for name, value in shared.items() if name in self.shared}
        return partial(self.choose, **told, **settings)

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        def reduce(seen: Seen, k: int):
            choose = self.bind(settings, {**shared, "seed": seen.seeds})
            keep = choose_tokens(choose, seen.features, k, trusted=True)
            return [[reduced] for reduced in keep_rows(seen.features, keep)]

        return reduce


@dataclass(frozen=True, kw_only=True, eq=False)
class Reducer(BeforeModel):
    """Any other method before the language model: it makes new tokens, or looks at more than features."""

    reduce: Callable[..., Any]
    """(Seen, k, **settings) -> as a `Reduction` gives."""
    fits: Callable[..., None] | None = None
    """(patches of a picture, **settings) -> raises ValueError if the settings do not fit them."""

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        return partial(self.reduce, **settings)


@dataclass(frozen=True, slots=True)
class Sample:
    """The unpruned model and prompts for it: input rows [length, D] and the span of each prompt's image."""

    model: Any
    embeds: list[Tensor]
    spans: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How a setting that only data can say is fitted: its name, and (Sample, retentions) -> its value for each."""

    setting: str
    values: Callable[[Sample, Sequence[float]], list[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class InModel(Method):
    """Deletes tokens inside the language model, which every token enters. Its schedule follows from its settings."""

    policy: Callable[..., Policy]
    """(**settings) -> what `otprune.layerwise` runs."""
    cost: Callable[..., int]
    """(Sizes, **settings) -> multiply-adds of what `otprune.layerwise.attention` computes beside the layers."""
    rows: Callable[..., Schedule]
    """(num_visual, num_layers, as_released, **settings) -> schedule."""
    takes_tiles: bool = False
    """Whether its settings fix no number of tokens, so that images may differ in theirs."""
    calibrate: Callable[..., dict[str, Any]] | None = None
    """(Sample, retention=, threshold=, first_layer=) -> its settings, and what else it found."""
    fit: Fit | None = None
    """Of a method that cannot run without a setting that is fitted to data."""

    inside_model: ClassVar[bool] = True
    keeps_all: bool = True
    keeps_grid: bool = True

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        return keep_all

    def own_flops(self, sizes: Sizes, settings: Mapping[str, Any], *, on_cpu: bool) -> int:
        return self.cost(sizes, **settings)

    @property
    def scheduled_by(self) -> tuple[str, ...]:
        return tuple(self.settings)

    def _rows(self, num_visual: int, num_layers: int, as_released: bool, settings: Mapping[str, Any]) -> Schedule:
        return self.rows(num_visual, num_layers, as_released, **settings)
