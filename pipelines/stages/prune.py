"""What is left of each image before the language model reads it, by whichever method: the heart of the encode stage.

A method takes a batch of pictures through the vision tower and returns one `Kept` for each, or one for each prompt of
each where the method looks at the prompt. What it needs beside projected tokens is computed only for it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otprune import num_kept, select_tokens
from otprune.anyres import pack_tiles
from otprune.methods import check_settings, get_method
from otprune.models import Checkpoint, LlavaEncoder, load_encoder
from otprune.models.relevance import Relevance, make_relevance
from otprune.reducers import m3_grids, m3_pool, prumerge
from otprune.selectors.cdpruner import cdpruner
from pipelines.config.keys import PruneConfig
from pipelines.stages.gpu import Place
from pipelines.stages.token_arrays import Kept


class Pruner:
    """The encoder of a checkpoint and one method. `k` is how many tokens the retention keeps."""

    def __init__(self, checkpoint: Checkpoint, prune: PruneConfig, settings: dict[str, Any], place: Place):
        """`settings` are the method's, resolved for the checkpoint."""
        method, model, dtype, device = prune.method, checkpoint.path, place.torch_dtype, place.device
        self.method, self.kind = method, get_method(method).kind
        self.requires = get_method(method).requires
        self.settings = check_settings(method, settings)
        self.encoder: LlavaEncoder = load_encoder(
            model, dtype=dtype, device=device, attention="class_attention" in self.requires
        )
        self.per_tile = prune.per_tile or bool(self.requires)
        num_tokens = self.encoder.num_tokens
        self.k = num_tokens if self.kind in ("none", "in_llm") else num_kept(prune.retention, num_tokens)
        self.retention = prune.retention
        self.selection = {"method": method, "gamma": prune.gamma, "gamma_scale": prune.gamma_scale}
        self.relevance: Relevance | None = None
        if "relevance" in self.requires:
            self.relevance = make_relevance(self.settings, model, dtype, device)

    @property
    def per_prompt(self) -> bool:
        """Whether what is kept depends on the prompt."""
        return "relevance" in self.requires

    def __call__(
        self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]], sizes: np.ndarray | None = None
    ) -> list[list[Kept]]:
        """Pixels uint8 [B, H, H, 3], a seed int64 [B] and the prompts of each picture -> what is kept of each.

        LLaVA-1.6 has crops [B, T, H, H, 3] and `sizes` [B, 4] instead (`anyres.stack_pictures`).
        """
        if sizes is None:
            return self._squares(pixels, seeds, prompts)
        counts = [1 + int(rows * columns) for _, _, rows, columns in sizes]
        crops = torch.cat([shown[:count] for shown, count in zip(pixels, counts, strict=True)])
        if not self.per_tile or self.kind in ("none", "in_llm") or self.method == "m3":
            features = self.encoder(crops).split(counts)
            return [[self._packed(*each)] for each in zip(features, sizes.tolist(), seeds, strict=True)]
        owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
        places = torch.cat([torch.arange(count) for count in counts])  # no two crops draw the same random tokens
        left = iter(self._squares(crops, seeds[owners] + places, [prompts[owner] for owner in owners]))
        images = [[next(left) for _ in range(count)] for count in counts]
        num_tokens = self.encoder.num_tokens
        return [[join_crops(prompt, num_tokens) for prompt in zip(*image, strict=True)] for image in images]

    def _packed(self, crops: Tensor, size: list[int], seed: Tensor) -> Kept:
        """Joint selection, as released: among all tokens of an image, newline tokens and overview too."""
        height, width, rows, columns = size
        assert self.encoder.newline is not None, "tiles are LLaVA-1.6's"
        layout: dict[str, Any] = {"grid": (rows, columns), "image_size": (height, width)}
        num_visual = len(pack_tiles(crops[..., :1], newline_D=self.encoder.newline[:1], **layout))
        if self.method == "m3":
            crops = torch.stack([kept.tokens for kept in self._pool(crops)])
        tokens = pack_tiles(crops, newline_D=self.encoder.newline, **layout)
        if self.method == "m3":
            return Kept(tokens, torch.full((len(tokens),), -1), num_visual)
        if self.kind in ("none", "in_llm"):
            return Kept(tokens, torch.arange(len(tokens)), num_visual)
        k = num_kept(self.retention, num_visual)
        (index,) = select_tokens(tokens[None], k, seed=seed[None].to(tokens.device), **self.selection)
        return Kept(tokens[index], index, num_visual)

    def _squares(self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]]) -> list[list[Kept]]:
        if "class_attention" in self.requires:
            return [[kept] for kept in self._merge(pixels)]
        if self.relevance is not None:
            return self._by_prompt(pixels, prompts, self.relevance)
        features = self.encoder(pixels)
        if self.kind in ("none", "in_llm"):
            everything = torch.arange(features.shape[1])
            return [[Kept(tokens, everything)] for tokens in features]
        if self.method == "m3":
            return [[kept] for kept in self._pool(features)]
        keep = select_tokens(features, self.k, seed=seeds.to(features.device), **self.selection)
        return [[Kept(tokens[index], index)] for tokens, index in zip(features, keep, strict=True)]

    def _by_prompt(self, pixels: Tensor, prompts: list[list[str]], relevance: Relevance) -> list[list[Kept]]:
        """CDPruner: every prompt of a picture has its own tokens."""
        patches = self.encoder.patches(self.encoder.see(pixels))
        features = self.encoder.project(patches)
        owner = [i for i, texts in enumerate(prompts) for _ in texts]
        texts = [text for texts in prompts for text in texts]
        method = partial(
            cdpruner, relevance=relevance(patches[owner], features[owner], texts), theta=self.settings["theta"]
        )
        keep = iter(select_tokens(features[owner], self.k, method=method))
        return [
            [Kept(tokens[index], index) for index in (next(keep) for _ in texts)]
            for tokens, texts in zip(features, prompts, strict=True)
        ]

    def _pool(self, features: Tensor) -> list[Kept]:
        side = m3_grids(features.shape[1])[-1]
        grid = self.settings["grid"] or next(g for g in m3_grids(side**2) if g**2 >= self.k)
        middle = torch.arange(grid) * (side // grid) + side // grid // 2
        source = (middle[:, None] * side + middle).flatten()
        return [Kept(tokens, source) for tokens in m3_pool(features, grid)]

    def _merge(self, pixels: Tensor) -> list[Kept]:
        """PruMerge merges what the projector reads."""
        hidden = self.encoder.see(pixels)
        attention, keys = self.encoder.class_attention(hidden)
        plus = self.method == "prumerge_plus"
        k = None if plus or self.settings["adaptive"] else max(self.k, 2)
        merged = prumerge(self.encoder.patches(hidden), keys, attention, k=k, plus=plus)
        return [Kept(self.encoder.project(one.features), one.source) for one in merged]


def join_crops(crops: Sequence[Kept], num_tokens: int) -> Kept:
    """What is kept of one picture, crop after crop, each of `num_tokens`."""
    sources = [
        torch.where(kept.source < 0, kept.source, kept.source + number * num_tokens)
        for number, kept in enumerate(crops)
    ]
    return Kept(torch.cat([kept.tokens for kept in crops]), torch.cat(sources), len(crops) * num_tokens)
