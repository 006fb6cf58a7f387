"""One executor for every method that deletes image tokens inside the language model.

A policy (`policy.py`) decides "after layer l keep the set I". Prefill is a loop over the model's own decoder layers
with fused attention. After an event the executor gathers the kept rows and left-pads the batch again, so that later
layers process and cache only the kept rows. Kept rows keep their positions in the whole prompt, and generated tokens
take the positions behind the whole prompt, as FastV, VTW and FitPrune publish it. Under a policy that renumbers, as
PyramidDrop publishes it, the rows of every layer are numbered from 0 without gaps, and a generated token has in each
layer the number of the rows before it there. The cache of every layer has its own length, and its own mask if the batch
is ragged.

For every kept row, deleting other rows after layer l equals hiding them from the attention of layers l+1 and later,
with the positions that the rows have there.

Departures:
- The released implementations run one image at a hard-coded place, on one model class of an old transformers; this
  executor runs batches of any prompts on LLaMA, Mistral (without a window), Qwen2 and Qwen3.
  test_a_left_padded_batch_equals_its_prompts_alone
- Scores are ranked in float32; the released code ranks them in the model's half precision.

Shape suffixes: B prompts, L rows of the longest prompt, D model width, V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from otprune.layerwise.attention import headmax, last_row, limited_attention
from otprune.layerwise.cache import LayerCache
from otprune.layerwise.layout import Layout, keep_rows, pad_prompts
from otprune.layerwise.policy import KeepAll, Need, Policy, State
from otprune.layerwise.steps import check_every, marked, settled

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """The result of reading a batch of prompts."""

    logits: Tensor
    """Next-token logits [B, V]."""
    cache: LayerCache
    layouts: list[Layout]
    """The rows that each layer processed."""


@torch.inference_mode()
def generate_layerwise(
    model: Any,
    embeds: list[Tensor],
    image_spans: list[tuple[int, int]],
    policy: Policy,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    choose: Callable[[Tensor, int], Tensor] | None = None,
) -> list[list[int]]:
    """Generates answers to prompts; `policy` deletes image tokens inside the model during prefill.

    Args:
        model: a causal language model of transformers, of one of MODEL_TYPES, in eval mode with "sdpa" attention.
        embeds: input rows [L_i, D] of each prompt, text and image in order, in the model's dtype.
        image_spans: (first, behind last) row of each prompt's image.
        max_new_tokens: the largest number of tokens of an answer, at least 1.
        end_tokens: ids that end an answer; without any, every answer has max_new_tokens tokens.
        choose: (logits [B, V], step from 0 on) -> the next token ids int64 [B]; None takes the likeliest token.

    Returns:
        The new token ids of each prompt, up to and including its end token.

    Raises:
        ValueError: as `pad_prompts` and the policy; max_new_tokens below 1; a model that the executor does not support.
        FloatingPointError: if logits are not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    state = prefill(model, embeds, image_spans, policy, room=max_new_tokens - 1)
    choose = choose or (lambda logits, _: logits.argmax(dim=-1))
    token_B = choose(state.logits, 0)
    ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=token_B.device)
    new = [marked(token_B, state.logits)]
    open_B, every = (new[0] >= 0) & ~torch.isin(token_B, ends), check_every(token_B.device)
    for step in range(1, max_new_tokens):
        # Asking whether all answers are finished waits for the device, so the loop asks only once in some steps.
        if len(ends) and step % every == 0 and not open_B.any():
            break
        logits = _decode_step(model, state, token_B, step - 1)
        token_B = choose(logits, step)
        new.append(marked(token_B, logits))
        open_B = open_B & (new[-1] >= 0) & ~torch.isin(token_B, ends)
    return settled([_until_end(ids, end_tokens) for ids in torch.stack(new, dim=1).tolist()])


@torch.inference_mode()
def prefill_logits(
    model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]], policy: Policy | None = None
) -> Tensor:
    """Next-token logits [B, V] in the model's dtype after a prefill under `policy`; None deletes nothing.

    Arguments and errors are those of `generate_layerwise`.
    """
    return prefill(model, embeds, image_spans, policy or KeepAll()).logits


@torch.inference_mode()
def prefill(
    model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]], policy: Policy, *, room: int = 0
) -> Prefill:
    """Runs all layers on the prompts; `room` is the number of cache rows to allocate for decoding."""
    _check_model(model)
    hidden_BLD, layout = pad_prompts(embeds, image_spans)
    cache = LayerCache(len(model.model.layers), room=room)
    hidden_BLD, layouts = run_layers(model, hidden_BLD, layout, policy, cache)
    return Prefill(logits=last_logits(model, hidden_BLD), cache=cache, layouts=layouts)


def run_layers(
    model: Any, hidden_BLD: Tensor, layout: Layout, policy: Policy, cache: LayerCache, *, first: int = 0
) -> tuple[Tensor, list[Layout]]:
    """Runs layers `first` .. last on the rows [B, L, D] that enter layer `first`.

    Returns the rows that leave the last layer, and the layout of each layer that ran.
    """
    layers, rotate = model.model.layers, model.model.rotary_emb
    events = _checked_events(policy, len(layers))
    layouts: list[Layout] = []
    rotary, mask = rotate(hidden_BLD, position_ids=layout.position), layout.causal_mask()
    for index in range(first or -1, len(layers)):  # index -1 runs no layer, only the event before layer 0
        entering_BLD = hidden_BLD
        if index >= 0:
            layouts.append(layout)
            hidden_BLD = layers[index](
                entering_BLD,
                attention_mask=mask,
                position_ids=layout.position,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        if index not in events:
            continue
        match events[index]:
            case "none":
                attention = None
            case "last_row":
                attention = last_row(layers[index], entering_BLD, rotary, layout, cache.keys(index))
            case "next_row":
                attention = last_row(layers[index + 1], hidden_BLD, rotary, layout, None)
            case "headmax":
                attention = headmax(layers[index], entering_BLD, rotary, layout, cache.keys(index))
        state = State(layer=index, hidden=hidden_BLD, layout=layout, attention=attention)
        hidden_BLD, kept = keep_rows(hidden_BLD, layout, policy.choose(state), renumber=policy.renumbers)
        if kept is not layout:  # `keep_rows` returns the same object if it deletes nothing
            layout = kept
            rotary, mask = rotate(hidden_BLD, position_ids=layout.position), layout.causal_mask()
    return hidden_BLD, layouts


def last_logits(model: Any, hidden_BLD: Tensor) -> Tensor:
    """Next-token logits [B, V], from the last row of each prompt."""
    return model.lm_head(model.model.norm(hidden_BLD[:, -1]))


def _decode_step(model: Any, state: Prefill, token_B: Tensor, num_before: int) -> Tensor:
    """Runs all layers on one new token of each prompt and returns the logits [B, V] behind it.

    `num_before` is the number of generated tokens before it.
    """
    hidden_B1D = model.get_input_embeddings()(token_B[:, None])
    # Layers between two events share a layout, and all layers share `end` unless a policy renumbers.
    masks: dict[int, Tensor | None] = {}
    rotaries: dict[int, tuple[Tensor, Any]] = {}
    for index, (layer, layout) in enumerate(zip(model.model.layers, state.layouts, strict=True)):
        if id(layout) not in masks:
            num_new = state.cache.lengths[index] - layout.valid.shape[1] + 1
            visible_BL = F.pad(layout.valid, (0, num_new), value=True)
            masks[id(layout)] = visible_BL[:, None, None] if layout.is_padded else None
        if id(layout.end) not in rotaries:
            position_B1 = layout.end + num_before
            rotaries[id(layout.end)] = position_B1, model.model.rotary_emb(hidden_B1D, position_ids=position_B1)
        position_B1, rotary = rotaries[id(layout.end)]
        hidden_B1D = layer(
            hidden_B1D,
            attention_mask=masks[id(layout)],
            position_ids=position_B1,
            past_key_values=state.cache,
            use_cache=True,
            position_embeddings=rotary,
        )
    return last_logits(model, hidden_B1D)


def _checked_events(policy: Policy, num_layers: int) -> Mapping[int, Need]:
    """The policy's events, after checking that the attention they need exists.

    Before layer 0 no layer has run, and after the last layer none comes next.
    """
    events = policy.events(num_layers)
    for layer, need in events.items():
        possible = {-1: ("none", "next_row"), num_layers - 1: ("none", "last_row", "headmax")}
        if not -1 <= layer < num_layers:
            raise ValueError(f"events must come after layers [-1, {num_layers}), got {layer}")
        if need not in possible.get(layer, ("none", "last_row", "next_row", "headmax")):
            raise ValueError(f"an event after layer {layer} of {num_layers} cannot see {need!r}")
    return events


def _until_end(ids: list[int], end_tokens: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_tokens), len(ids))
    return ids[: end + 1]


def _check_model(model: Any) -> None:
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model must be one of {', '.join(MODEL_TYPES)}, got {config.model_type}")
    if limit := limited_attention(config):
        raise ValueError(f"model must attend to everything in every layer, got {limit}")
    if config._attn_implementation != "sdpa":
        raise ValueError(f"model must run sdpa attention, got {config._attn_implementation}")
