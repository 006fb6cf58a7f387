"""Where VTW may withdraw the image: the first layer at which the next-token distribution hardly notices.

    D(K) = mean over samples of KL(p || p_K),    K = first layer with D(K) <= threshold

p is the unpruned model's next-token distribution and p_K the one with withdrawal at K. The release searches K from 5
on some 20 samples of the target task; its threshold is 0.003, 0.0005 for LLaVA-1.5-13B, 0.0001 for LLaVA-1.6-7B.

The unpruned run is done once a sample and its text rows are kept at every layer: withdrawal at K continues from those
that enter layer K, with text alone. T layers cost one full prefill and T^2 / 2 layers of text a sample at most, where
the release runs 2 T full models. Memory: T x text rows x width numbers a sample.

Departures:
- The sample is the user's; the release takes the first ones of the benchmark that it is about to be measured on.
- The distributions are those of the prompt's last token, in float32.
- The direction of the divergence is our reading: how many nats the withdrawal loses on the unpruned model's own answer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from otprune.layerwise.cache import LayerCache
from otprune.layerwise.executor import last_logits, prefill, run_layers
from otprune.layerwise.layout import Layout, keep_rows
from otprune.layerwise.policy import KeepAll, Need, State, check_layer
from otprune.methods.base import Sample

RELEASED_FIRST_LAYER, RELEASED_LAYERS = 5, 32  # where the release's search begins, and of how many layers


def find_vtw_layer(
    model: Any,
    embeds: list[Tensor],
    image_spans: list[tuple[int, int]],
    *,
    threshold: float = 0.003,
    first_layer: int = 5,
) -> int:
    """The first K >= first_layer with D(K) <= threshold; the number of layers (no withdrawal) if none has.

    The sample's prompts are given as to `generate_layerwise`.

    Raises:
        ValueError: as `generate_layerwise`; a negative threshold; first_layer outside the model.
    """
    if threshold < 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    divergences = vtw_divergences(model, embeds, image_spans, first_layer=first_layer)
    return next((layer for layer, divergence in divergences if divergence <= threshold), len(model.model.layers))


def calibrate_vtw(
    sample: Sample, *, threshold: float, first_layer: int | None, retention: float | None = None
) -> dict[str, Any]:
    """`layer` as `find_vtw_layer`, and every divergence of the search; `first_layer` None is `first_searched`."""
    num_layers = len(sample.model.model.layers)
    first = first_searched(num_layers) if first_layer is None else first_layer
    divergences = dict(vtw_divergences(sample.model, sample.embeds, sample.spans, first_layer=first))
    below = (layer for layer, value in divergences.items() if value <= threshold)
    return {"layer": next(below, num_layers), "divergences": divergences}


def first_searched(num_layers: int) -> int:
    """Where the search begins: the release's layer, and in a model of fewer layers than its own in proportion."""
    return min(RELEASED_FIRST_LAYER, round(num_layers * RELEASED_FIRST_LAYER / RELEASED_LAYERS))


def vtw_divergences(
    model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]], *, first_layer: int = 5
) -> Iterator[tuple[int, float]]:
    """(K, D(K)) for K = first_layer .. last layer, each computed when it is asked for; nothing runs before."""
    num_layers = len(model.model.layers)
    check_layer(first_layer, num_layers)
    if not embeds:
        raise ValueError("embeds must hold a sample, got none")
    samples = [_read_text(model, rows, span, first_layer) for rows, span in zip(embeds, image_spans, strict=True)]
    for layer in range(first_layer, num_layers):
        yield layer, sum(_divergence(model, sample, layer) for sample in samples) / len(samples)


@dataclass(frozen=True)
class _TextStates:
    """A policy that deletes nothing and keeps the text rows that enter each layer from `first_layer` on."""

    first_layer: int
    entering: dict[int, tuple[Tensor, Layout]] = field(default_factory=dict)

    def events(self, num_layers: int) -> Mapping[int, Need]:
        return {layer - 1: "none" for layer in range(self.first_layer, num_layers)}

    def choose(self, state: State) -> Tensor:
        image_BL = state.layout.image
        self.entering[state.layer + 1] = keep_rows(state.hidden, state.layout, torch.zeros_like(image_BL))
        return image_BL


@dataclass(frozen=True)
class _Sample:
    """The unpruned model's log-probabilities [V], and the text rows that enter each layer."""

    log_p: Tensor
    entering: dict[int, tuple[Tensor, Layout]]


def _read_text(model: Any, rows: Tensor, span: tuple[int, int], first_layer: int) -> _Sample:
    states = _TextStates(first_layer)
    logits_BV = prefill(model, [rows], [span], states).logits
    return _Sample(logits_BV[0].float().log_softmax(dim=-1), states.entering)


@torch.inference_mode()
def _divergence(model: Any, sample: _Sample, layer: int) -> float:
    cache = LayerCache(len(model.model.layers), room=0)
    hidden_BLD, _ = run_layers(model, *sample.entering[layer], KeepAll(), cache, first=layer)
    log_q_V = last_logits(model, hidden_BLD)[0].float().log_softmax(dim=-1)
    return float((sample.log_p.exp() * (sample.log_p - log_q_V)).sum())
