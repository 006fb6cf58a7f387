"""VTW's calibration: finds the first layer where withdrawing the image hardly changes the next-token distribution.

    D(K) = mean over samples of KL(p_K || p) = mean over samples of sum p_K (log p_K - log p)
    K = first layer with D(K) <= threshold

p is the next-token distribution of the unpruned model and p_K that with withdrawal at K: the divergence, in the
direction of the release, is large where withdrawal makes the model say what it would not have said. The release
searches K from 5 on some 20 samples of the target task. Its threshold is 0.003; 0.0005 for LLaVA-1.5-13B; 0.0001 for
LLaVA-1.6-7B. Where no layer meets the threshold there is no K: the release fails on an index, and this search names
the layer that comes nearest.

The unpruned model runs once a sample and records the text rows that enter every layer. Withdrawal at K continues from
the rows that enter layer K, with text alone. A search over T layers costs at most one full prefill and T^2 / 2 layers
of text a sample; the release runs 2 T full models. Memory: T x text rows x width numbers a sample.

Departures:
- The user provides the samples; the release takes the first ones of the benchmark on which it is then measured.
- The distributions are those behind the prompt's last token, in float32; the release takes them in the model's float16.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from otprune.layerwise.cache import LayerCache
from otprune.layerwise.executor import last_logits, prefill, run_layers
from otprune.layerwise.layout import Layout, keep_rows
from otprune.layerwise.policy import KeepAll, Need, State, check_layer
from otprune.methods.base import Sample

RELEASED_FIRST_LAYER, RELEASED_LAYERS = 5, 32  # the release's search begins at layer 5 of 32


def find_vtw_layer(
    model: Any,
    embeds: list[Tensor],
    image_spans: list[tuple[int, int]],
    *,
    threshold: float = 0.003,
    first_layer: int = 5,
) -> int:
    """The first K >= first_layer with D(K) <= threshold.

    `embeds` and `image_spans` are as in `generate_layerwise`.

    Raises:
        ValueError: as `generate_layerwise` and `first_below`; a negative threshold; first_layer outside the model.
    """
    if threshold < 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    return first_below(threshold, vtw_divergences(model, embeds, image_spans, first_layer=first_layer))


def first_below(threshold: float, divergences: Iterable[tuple[int, float]]) -> int:
    """The first K of (K, D(K)) with D(K) <= threshold.

    Raises:
        ValueError: if there is none.
    """
    seen = []
    for layer, divergence in divergences:
        if divergence <= threshold:
            return layer
        seen.append((divergence, layer))
    if not seen:
        raise ValueError("first_layer must be a layer of the model, got the number behind its last")
    nearest, layer = min(seen)
    raise ValueError(
        f"threshold must be one that a layer in [{seen[0][1]}, {seen[-1][1]}] meets, got {threshold:g}: "
        f"the smallest divergence is {nearest:.3g}, of withdrawal at layer {layer}"
    )


def calibrate_vtw(
    sample: Sample, *, threshold: float, first_layer: int | None, retention: float | None = None
) -> dict[str, Any]:
    """{"layer": as `find_vtw_layer`, "divergences": {K: D(K)}}; `first_layer` None is `first_searched`.

    Raises:
        ValueError: as `first_below`.
    """
    first = first_searched(len(sample.model.model.layers)) if first_layer is None else first_layer
    divergences = dict(vtw_divergences(sample.model, sample.embeds, sample.spans, first_layer=first))
    return {"layer": first_below(threshold, divergences.items()), "divergences": divergences}


def first_searched(num_layers: int) -> int:
    """The layer where the search begins: the release's, or in proportion for models with fewer layers than its 32."""
    return min(RELEASED_FIRST_LAYER, round(num_layers * RELEASED_FIRST_LAYER / RELEASED_LAYERS))


def vtw_divergences(
    model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]], *, first_layer: int = 5
) -> Iterator[tuple[int, float]]:
    """Yields (K, D(K)) for K = first_layer .. last layer, and computes each one lazily.

    Raises:
        ValueError: at the first step: as `generate_layerwise`, without samples, or on first_layer outside the model.
    """
    num_layers = len(model.model.layers)
    check_layer(first_layer, num_layers)
    if not embeds:
        raise ValueError("embeds must hold a sample, got none")
    samples = [_read_text(model, rows, span, first_layer) for rows, span in zip(embeds, image_spans, strict=True)]
    for layer in range(first_layer, num_layers):
        yield layer, sum(_divergence(model, sample, layer) for sample in samples) / len(samples)


@dataclass(frozen=True)
class _TextStates:
    """A policy that deletes nothing and records the text rows that enter each layer from `first_layer` on."""

    first_layer: int
    entering: dict[int, tuple[Tensor, Layout]] = field(default_factory=dict)
    renumbers = False

    def events(self, num_layers: int) -> Mapping[int, Need]:
        return {layer - 1: "none" for layer in range(self.first_layer, num_layers)}

    def choose(self, state: State) -> Tensor:
        image_BL = state.layout.image
        self.entering[state.layer + 1] = keep_rows(state.hidden, state.layout, torch.zeros_like(image_BL))
        return image_BL


@dataclass(frozen=True)
class _Sample:
    """The unpruned model's results for one prompt: log-probabilities [V], and the text rows that enter each layer."""

    log_p: Tensor
    entering: dict[int, tuple[Tensor, Layout]]


def _read_text(model: Any, rows: Tensor, span: tuple[int, int], first_layer: int) -> _Sample:
    states = _TextStates(first_layer)
    logits_BV = prefill(model, [rows], [span], states).logits
    return _Sample(logits_BV[0].float().log_softmax(dim=-1), states.entering)


@torch.inference_mode()
def _divergence(model: Any, sample: _Sample, layer: int) -> float:
    """KL(p_K || p) of one sample, where `layer` is K: runs only layers K and later, on the recorded text rows."""
    cache = LayerCache(len(model.model.layers), room=0)
    hidden_BLD, _ = run_layers(model, *sample.entering[layer], KeepAll(), cache, first=layer)
    log_q_V = last_logits(model, hidden_BLD)[0].float().log_softmax(dim=-1)
    return float((log_q_V.exp() * (log_q_V - sample.log_p)).sum())
