"""What is left of each image before the language model reads it, by whichever method: the heart of the encode stage.

A method takes a batch of pictures through the vision tower and returns one `Kept` for each, or one for each prompt of
each where the method looks at the prompt. What it needs beside projected tokens is computed only for it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from otprune import num_kept
from otprune.anyres import pack_tiles
from otprune.methods import get_method
from otprune.methods.reduction import Reduced, Seen
from otprune.models import Checkpoint, LlavaEncoder, load_encoder
from otprune.models.relevance import Relevance, make_relevance
from pipelines.config.keys import PruneConfig
from pipelines.stages.gpu import Place
from pipelines.stages.token_arrays import Kept


class Picture(NamedTuple):
    """The size of a picture and the grid of its tiles, beside which there is one crop that shows all of it."""

    height: int
    width: int
    rows: int
    columns: int

    @property
    def num_crops(self) -> int:
        return 1 + self.rows * self.columns


class Pruner:
    """The encoder of a checkpoint and one method. `k` is how many tokens the retention keeps."""

    def __init__(self, checkpoint: Checkpoint, prune: PruneConfig, settings: dict[str, Any], place: Place):
        """`settings` are the method's, resolved for the checkpoint."""
        self.method = get_method(prune.method)
        checked, requires = self.method.check(settings), self.method.requires
        model, dtype, device = checkpoint.path, place.torch_dtype, place.device
        self.encoder: LlavaEncoder = load_encoder(
            model, dtype=dtype, device=device, attention="class_attention" in requires
        )
        self.relevance: Relevance | None = None
        if "relevance" in requires:
            self.relevance = make_relevance(checked, model, dtype, device)
        self.reduce = self.method.build(checked, {"gamma": prune.gamma, "gamma_scale": prune.gamma_scale})
        self.retention = 1.0 if self.method.keeps_all else prune.retention
        self.k = num_kept(self.retention, self.encoder.num_tokens)
        if self.method.keeps_grid:
            self.lay_out = self._pack_crops
        elif prune.per_tile or requires:  # what the encoder computes beside features is computed crop by crop
            self.lay_out = self._crop_by_crop
        else:
            self.lay_out = self._choose_among_all

    @property
    def per_prompt(self) -> bool:
        """Whether what is kept depends on the prompt."""
        return self.method.per_prompt

    def __call__(
        self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]], sizes: np.ndarray | None = None
    ) -> list[list[Kept]]:
        """Pixels uint8 [B, H, H, 3], a seed int64 [B] and the prompts of each picture -> what is kept of each.

        LLaVA-1.6 has crops [B, T, H, H, 3] and `sizes` [B, 4] instead (`tiles.stack_pictures`).
        """
        if sizes is None:
            return self._squares(pixels, seeds, prompts)
        pictures = [Picture(*size) for size in sizes.tolist()]
        crops = torch.cat([shown[: picture.num_crops] for shown, picture in zip(pixels, pictures, strict=True)])
        return self.lay_out(crops, seeds, prompts, pictures)

    def _squares(self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]]) -> list[list[Kept]]:
        """Pixels [B, H, H, 3]: square pictures, or crops, each by itself."""
        left = self.reduce(self._see(pixels, seeds, prompts), self.k)
        return [[self._kept(reduced) for reduced in picture] for picture in left]

    def _see(self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]]) -> Seen:
        """What the method requires, and nothing else."""
        hidden = self.encoder.see(pixels)
        patches, attention, keys, relevance = self.encoder.patches(hidden), None, None, None
        features = patches if self.method.before_projector else self.encoder.project(patches)
        if "class_attention" in self.method.requires:
            attention, keys = self.encoder.class_attention(hidden)
        if self.relevance is not None:
            owner = [picture for picture, texts in enumerate(prompts) for _ in texts]
            texts = [text for texts in prompts for text in texts]
            relevance = self.relevance(patches[owner], features[owner], texts)
        return Seen(
            features=features,
            seeds=seeds.to(features.device),
            prompts=prompts,
            keys=keys,
            class_attention=attention,
            relevance=relevance,
        )

    def _kept(self, reduced: Reduced, num_visual: int | None = None) -> Kept:
        tokens = self.encoder.project(reduced.features) if self.method.before_projector else reduced.features
        return Kept(tokens, reduced.source, num_visual)

    # LLaVA-1.6: three ways from the crops of a picture to what is left of it. The method decides which, once.

    def _choose_among_all(
        self, crops: Tensor, seeds: Tensor, prompts: list[list[str]], pictures: list[Picture]
    ) -> list[list[Kept]]:
        """As released: among all tokens of a picture, newline tokens and overview too."""
        kept = []
        for features, picture, seed, texts in zip(
            self._features(crops, pictures), pictures, seeds, prompts, strict=True
        ):
            packed = self._pack(features, picture)
            seen = Seen(features=packed[None], seeds=seed[None].to(packed.device), prompts=[texts])
            (left,) = self.reduce(seen, num_kept(self.retention, len(packed)))
            kept.append([self._kept(reduced, len(packed)) for reduced in left])
        return kept

    def _pack_crops(
        self, crops: Tensor, seeds: Tensor, prompts: list[list[str]], pictures: list[Picture]
    ) -> list[list[Kept]]:
        """Each crop becomes a smaller square, and the squares are laid out as the crops would be."""
        kept = []
        for features, picture, seed in zip(self._features(crops, pictures), pictures, seeds, strict=True):
            num_visual = len(self._pack(features[..., :1], picture))
            seen = Seen(features=features, seeds=seed.expand(len(features)), prompts=[[]] * len(features))
            squares = torch.stack([reduced.features for (reduced,) in self.reduce(seen, self.k)])
            tokens = self._pack(squares, picture)
            source = torch.arange(num_visual) if self.method.keeps_all else torch.full((len(tokens),), -1)
            kept.append([Kept(tokens, source, num_visual)])
        return kept

    def _crop_by_crop(
        self, crops: Tensor, seeds: Tensor, prompts: list[list[str]], pictures: list[Picture]
    ) -> list[list[Kept]]:
        """Each crop as if it were a picture of its own; no newline tokens."""
        counts = [picture.num_crops for picture in pictures]
        owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
        places = torch.cat([torch.arange(count) for count in counts])  # no two crops draw the same random tokens
        left = iter(self._squares(crops, seeds[owners] + places, [prompts[owner] for owner in owners]))
        images = [[next(left) for _ in range(count)] for count in counts]
        num_tokens = self.encoder.num_tokens
        return [[join_crops(prompt, num_tokens) for prompt in zip(*image, strict=True)] for image in images]

    def _features(self, crops: Tensor, pictures: list[Picture]) -> tuple[Tensor, ...]:
        """Of each picture the projected tokens [T, N, D] of its crops."""
        return self.encoder(crops).split([picture.num_crops for picture in pictures])

    def _pack(self, crops_TND: Tensor, picture: Picture) -> Tensor:
        assert self.encoder.newline is not None, "tiles are LLaVA-1.6's"
        newline = self.encoder.newline[: crops_TND.shape[-1]]
        grid, size = (picture.rows, picture.columns), (picture.height, picture.width)
        return pack_tiles(crops_TND, newline_D=newline, grid=grid, image_size=size)


def join_crops(crops: Sequence[Kept], num_tokens: int) -> Kept:
    """What is kept of one picture, crop after crop, each of `num_tokens`."""
    sources = [
        torch.where(kept.source < 0, kept.source, kept.source + number * num_tokens)
        for number, kept in enumerate(crops)
    ]
    return Kept(torch.cat([kept.tokens for kept in crops]), torch.cat(sources), len(crops) * num_tokens)
