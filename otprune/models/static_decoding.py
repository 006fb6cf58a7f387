"""Decoding in fixed shapes, so that a GPU replays each step as one CUDA graph.

`decoding.decode` launches every kernel of every layer anew at each step; with the short prompts that pruning leaves, a
GPU then waits for its host. Here a step works on the same memory from the first to the last: a static key-value cache,
a mask over all of it, and the counters that say where the next token goes. It is recorded once for a shape (rows, cache
length, longest answer, sampling) and replayed from then on.

The price: the cache is allocated for the longest answer, and finished rows stay in the batch until all have finished.
Rows are filled up to a power of two and lengths to a multiple of LENGTH_STEP, so that few shapes come up where prompts
are about equally long, as pruned ones are. Where they are not (LLaVA-1.6 with all its tokens), each batch would be
recorded anew: the plain loop is the better one.

Not measured: this was written without a GPU. test_static_decoding.py holds the answers against `decoding.decode`, on a
GPU with graphs, elsewhere with plain calls of the same step.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, StaticCache

from otprune.layerwise.attention import limited_attention
from otprune.layerwise.layout import causal_mask
from otprune.layerwise.steps import CHECK_EVERY, FILL, marked, settled
from otprune.models.decoding import draw, uniform_draws

LENGTH_STEP = 64
MAX_SHAPES = 4  # whose caches and graphs are kept
SPOILT = 2  # steps that are run before there is a graph of them

Step = Callable[[], None]


class StaticDecoder:
    """`decoding.decode` for one model: the same arguments but for the model, the same answers, other memory."""

    def __init__(self, model: Any, record: Callable[[Step], Step] | None = None):
        """`record` turns a step into what is called in its place: by default a CUDA graph's replay.

        Raises:
            ValueError: if the model's layers do not all see every place, or its positions depend on their values.
        """
        check_model(model.config)
        self.model, self.record = model, record or CudaGraphs(model.device)
        self._shapes: OrderedDict[tuple, tuple[_Batch, Step]] = OrderedDict()

    @torch.inference_mode()
    def __call__(
        self,
        embeds: Tensor,
        mask: Tensor,
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (),
    ) -> list[list[int]]:
        """New token ids of each row, up to and with its first end token, or `max_new_tokens` of them.

        Raises:
            torch.OutOfMemoryError: if the batch does not fit by itself, without what was kept for other shapes.
            FloatingPointError: if logits are not finite.
        """
        num_rows, num_tokens = mask.shape
        rows = 1 << (num_rows - 1).bit_length()
        length = -(-(num_tokens + max_new_tokens + SPOILT) // LENGTH_STEP) * LENGTH_STEP
        draws = uniform_draws(seeds, max_new_tokens, embeds.device) if temperature > 0 else None
        shape = (rows, length, max_new_tokens, tuple(end_tokens), temperature, top_p)
        try:
            ready = self._ready(shape, embeds, mask, draws)
        except torch.OutOfMemoryError:
            ready = None  # not tried again in here, where the error's frames keep what was allocated
        if ready is None:
            self.forget()
            ready = self._ready(shape, embeds, mask, draws)
        batch, step = ready
        for number in range(1, max_new_tokens):
            if number % CHECK_EVERY == 0 and not batch.open.any():
                break
            step()
        return settled(batch.answers[:num_rows].tolist())

    def forget(self) -> None:
        """Frees the memory of every shape."""
        self._shapes.clear()
        torch.cuda.empty_cache()

    def _ready(
        self, shape: tuple[Any, ...], embeds: Tensor, mask: Tensor, draws: Tensor | None
    ) -> tuple["_Batch", Step]:
        """The memory of this shape with the prompts in it, and its step, recorded if the shape is new."""
        if shape not in self._shapes:
            while len(self._shapes) >= MAX_SHAPES:
                self._shapes.popitem(last=False)
            batch = _Batch(self.model, *shape)
            batch.read(embeds, mask, draws)  # allocates the cache; recording then spoils what it holds
            self._shapes[shape] = batch, self.record(batch.step)
        self._shapes.move_to_end(shape)
        batch, step = self._shapes[shape]
        batch.read(embeds, mask, draws)
        return batch, step


class _Batch:
    """The memory of one shape: R rows of a batch, a cache of L places, answers of A tokens."""

    def __init__(
        self, model: Any, rows: int, length: int, longest: int, ends: Sequence[int], temperature: float, top_p: float
    ):
        self.model, self.temperature, self.top_p = model, temperature, top_p

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.seen = zeros(rows, 1, 1, length, dtype=torch.bool)  # places of the cache that a new token looks at
        self.place, self.number = zeros(1), zeros(1)  # of the next token: in the cache, in the answers
        self.tokens, self.positions = zeros(rows, 1), zeros(rows, 1)
        self.answers, self.open = zeros(rows, longest + SPOILT), zeros(rows, dtype=torch.bool)
        self.draws = zeros(rows, longest + SPOILT, dtype=torch.float64)
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=model.device)

    def read(self, embeds: Tensor, mask: Tensor, draws: Tensor | None) -> None:
        """Prompts [B, T, D], left-padded, B at most R: fills the cache and takes the first token of each answer."""
        num_rows, num_tokens = mask.shape
        spare = len(self.open) - num_rows
        embeds = torch.cat([embeds, embeds[:1].expand(spare, -1, -1)])
        valid = torch.cat([mask, mask[:1].expand(spare, -1)]).bool()
        self.cache.reset()
        self.answers.fill_(FILL)
        self.open.copy_(torch.arange(len(self.open), device=mask.device) < num_rows)
        if draws is not None:
            self.draws[:num_rows, : draws.shape[1]] = draws
        length = self.seen.shape[-1]
        logits = self.model(
            inputs_embeds=embeds,
            attention_mask=pad(causal_mask(valid), (0, length - num_tokens)),
            position_ids=(valid.long().cumsum(1) - 1).clamp_min(0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.seen.copy_(pad(valid, (0, length - num_tokens))[:, None, None])
        self.positions.copy_(valid.sum(1, keepdim=True))
        self.place.fill_(num_tokens)
        self.number.zero_()
        self._take(logits)

    def step(self) -> None:
        """One more token of every row. Touches this batch's memory alone, and the host never looks."""
        self.seen.index_fill_(3, self.place, True)
        logits = self.model(
            input_ids=self.tokens,
            attention_mask=self.seen,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.place += 1
        self.positions += 1
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        if self.temperature > 0:
            uniform = self.draws.index_select(1, self.number)[:, 0]
            tokens = draw(logits, self.temperature, self.top_p, uniform)
        else:
            tokens = logits.argmax(dim=1)
        written = marked(tokens, logits)
        self.answers.index_copy_(1, self.number, torch.where(self.open, written, FILL)[:, None])
        self.open &= (written >= 0) & (tokens[:, None] != self.ends).all(dim=1)
        self.tokens.copy_(tokens[:, None])
        self.number += 1


class CudaGraphs:
    """Turns a step into the replay of its CUDA graph."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, step: Step) -> Step:
        """Runs the step first, as libraries set themselves up at their first calls: SPOILT times, and to no purpose."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(SPOILT):
                    step()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                step()
        return graph.replay


def check_fixed_shapes(folder: Path) -> None:
    """`check_model` before anything is loaded."""
    config: Any = AutoConfig.from_pretrained(folder)
    check_model(config.text_config)


def check_model(config: Any) -> None:
    """Refuses what a fixed mask, or a graph, would get wrong.

    Raises:
        ValueError: for layers with a sliding window, and for rotary embeddings that change with the prompt's length.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "dynamic" in str(rope.get("rope_type", "")):
        raise ValueError(f"decoding in fixed shapes needs rotary embeddings of one kind, got {rope['rope_type']!r}")
    if limit := limited_attention(config):
        raise ValueError(f"decoding in fixed shapes needs layers that see everything, got {limit}")
