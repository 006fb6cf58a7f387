"""The record of a pruning method: all that the rest of the program knows about the method.

Each method's file defines one record, of one of three kinds:
    Selector   keeps k of N tokens before the language model, by their features alone
    Reducer    reduces the tokens before the language model by any other rule; keeping every token is one such rule
    InModel    deletes tokens while the language model reads its prompt; the decoder must run layer by layer

A record says which settings the method takes, what the method needs from the encoder, how it reduces a picture, what
its choice costs, how many rows each layer processes, and which of its budgets costs as much as another method. Every
method can derive its budget from `retention`; the method's own settings override the derived values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from otprune.choice import Choose, choose_tokens
from otprune.layerwise.policy import Policy
from otprune.methods.reduction import Reduction, Requirement, Seen, Wish, keep_all, keep_rows
from otprune.methods.settings import Setting, check_settings
from otprune.schedules import Schedule, num_kept, stage_rows
from otprune.shapes import LanguageShape

Shared = Literal["gamma", "gamma_scale", "seed"]
"""Settings that several methods share: their keys are `prune.gamma` and so on, not `prune.settings.gamma`."""

TokenCost = Callable[[int, int, int, bool], int]
"""(N tokens, width D, k kept tokens, whether on a CPU) -> multiply-adds of choosing the tokens of one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The numbers that decide what the choice of tokens costs for one image in its prompt."""

    shape: LanguageShape
    width: int
    """Of the tokens that the method chooses from."""
    num_text: int
    num_visual: int
    """Tokens that the method chooses from."""
    rows: Schedule
    """Visual tokens that the method leaves in each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """How the settings of `Method.visual_rows` give a method before the language model its number of tokens."""

    names: tuple[str, ...]
    """The settings that give the number."""
    num_tokens: Callable[..., int]
    """(N visual tokens, **settings of these names) -> tokens from layer 0 on."""
    of_means: Callable[[float, float], dict[str, Any]]
    """(mean kept tokens, mean visual tokens) of a finished run -> settings of these names with the same cost."""


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
"""For a method that does not derive its number of tokens from retention: `tokens` is the number, or its mean."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """What the records of every kind of method hold."""

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """The method's own settings; their keys are `prune.settings.<name>`."""
    shared: frozenset[Shared] = frozenset()
    requires: frozenset[Requirement] = frozenset()
    """What the encoder must compute beside the features."""
    wishes: frozenset[Wish] = frozenset()
    """What the encoder computes beside the features if it can; the method has a rule for where it cannot."""
    match: Callable[..., dict[str, Any]] | None = None
    """(Search, **settings) -> the settings, where the search has filled in those that are None. The function may take
    further keywords that narrow the search. None: the method has no budget to search."""

    inside_model: ClassVar[bool] = False
    keeps_all: bool = False
    """Whether every token goes to the language model, whatever `retention` says."""
    keeps_grid: bool = False
    """Whether the method reduces a square crop to a square, which LLaVA-1.6 can lay out beside its neighbours."""
    sends_smaller: bool = False
    """Whether the method sends the model smaller pictures, instead of pruning their tokens."""
    takes_tiles: bool = True
    """Whether images may have different numbers of visual tokens."""
    makes_tokens: bool = False
    """Whether the method makes tokens out of several, which have no place of their own in the picture."""
    before_projector: bool = False
    """Whether the method works on the projector's input; only the tokens that it leaves are projected."""

    @property
    def per_prompt(self) -> bool:
        """Whether the tokens kept of a picture depend on the prompt."""
        return "relevance" in self.requires

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting, given or default, after checking types and bounds.

        Raises:
            ValueError: an unknown setting, a wrong type, or a value out of bounds.
        """
        return check_settings(self.name, self.settings, given)

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        """The method's reduction before the language model.

        Args:
            settings: the method's own settings, from `check`.
            shared: all shared settings; the method uses those that it takes.
        """
        raise NotImplementedError

    def own_flops(self, sizes: Sizes, settings: Mapping[str, Any], *, on_cpu: bool) -> int:
        """Multiply-adds of choosing the tokens of one image; `settings` are the settings of `visual_rows`."""
        raise NotImplementedError

    @property
    def scheduled_by(self) -> tuple[str, ...]:
        """The settings that `visual_rows` takes."""
        raise NotImplementedError

    def visual_rows(self, num_visual: int, num_layers: int, *, as_released: bool = False, **settings: Any) -> Schedule:
        """Visual tokens in each layer's attention and FFN, in this package or, with `as_released`, in the release.

        Raises:
            ValueError: on missing or unknown settings, or values out of range.
        """
        if set(settings) != set(self.scheduled_by):
            raise ValueError(f"settings of {self.name} must be {list(self.scheduled_by)}, got {sorted(settings)}")
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
    """(features [B, N, D], k, **settings, **shared settings that it takes) -> int64 [B, k] of distinct indices."""

    def bind(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Choose:
        """`choose` with its own settings and with those of `shared` that the method takes."""
        accepted = {name: value for name, value in shared.items() if name in self.shared}
        return partial(self.choose, **accepted, **settings)

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        def reduce(seen: Seen, k: int):
            choose = self.bind(settings, {**shared, "seed": seen.seeds})  # each picture has a seed of its own
            keep = choose_tokens(choose, seen.features, k, trusted=True)
            return [[reduced] for reduced in keep_rows(seen.features, keep)]

        return reduce


@dataclass(frozen=True, kw_only=True, eq=False)
class Reducer(BeforeModel):
    """A method before the language model that makes new tokens, or reads more than features."""

    reduce: Callable[..., Any]
    """(Seen, k, **settings) -> the result of a `Reduction`."""
    fits: Callable[..., None] | None = None
    """(number of patches of a picture, **settings) -> None; raises ValueError if the settings do not fit."""
    calibrate: Callable[..., dict[str, Any]] | None = None
    """(tokens [N, D] of each picture, retention=, **settings that have values) -> the settings, and other results."""

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        return partial(self.reduce, **settings)


@dataclass(frozen=True, slots=True)
class Sample:
    """The unpruned model and prompts that settings are fitted on."""

    model: Any
    embeds: list[Tensor]
    """Input rows [length, D] of each prompt."""
    spans: list[tuple[int, int]]
    """(first, behind last) row of each prompt's image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How a setting is fitted to data."""

    setting: str
    values: Callable[[Sample, Sequence[float]], list[Any]]
    """(Sample, retentions) -> the value of the setting for each retention."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InModel(Method):
    """Deletes tokens inside the language model. Every token enters layer 0; the settings decide the schedule."""

    policy: Callable[..., Policy]
    """(**settings) -> the policy that `otprune.layerwise` runs."""
    cost: Callable[..., int]
    """(Sizes, **settings) -> multiply-adds of the attention that `otprune.layerwise.attention` recomputes."""
    rows: Callable[..., Schedule]
    """(num_visual, num_layers, as_released, **settings) -> schedule."""
    calibrate: Callable[..., dict[str, Any]] | None = None
    """(Sample, retention=, threshold=, first_layer=) -> the settings, and other results of the calibration."""
    fit: Fit | None = None
    """Set if the method cannot run without a setting that is fitted to data."""

    inside_model: ClassVar[bool] = True
    takes_tiles: bool = False
    keeps_all: bool = True
    keeps_grid: bool = True

    def build(self, settings: Mapping[str, Any], shared: Mapping[Shared, Any]) -> Reduction:
        return keep_all

    def own_flops(self, sizes: Sizes, settings: Mapping[str, Any], *, on_cpu: bool) -> int:
        return self.cost(sizes, **self.split(settings)[0])

    @property
    def scheduled_by(self) -> tuple[str, ...]:
        return tuple(name for name, setting in self.settings.items() if setting.schedules)

    def split(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings without those that decide no number of tokens, and those."""
        others = {name for name, setting in self.settings.items() if not setting.schedules}
        scheduling = {name: value for name, value in settings.items() if name not in others}
        return scheduling, {name: settings[name] for name in others if name in settings}

    def visual_rows(self, num_visual: int, num_layers: int, *, as_released: bool = False, **settings: Any) -> Schedule:
        """As of `Method`; settings that decide no number of tokens may be among them."""
        scheduling, _ = self.split(settings)
        return super().visual_rows(num_visual, num_layers, as_released=as_released, **scheduling)

    def _rows(self, num_visual: int, num_layers: int, as_released: bool, settings: Mapping[str, Any]) -> Schedule:
        return self.rows(num_visual, num_layers, as_released, **settings)
