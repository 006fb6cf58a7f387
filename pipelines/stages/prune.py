"""Prunes the visual tokens of pictures with any method: the heart of the encode stage.

A batch of pictures goes through the vision tower and then through the method, which keeps some of each picture's visual
tokens. The result is one `Kept` for each picture, or one for each prompt of each picture if the method looks at the
prompt. Other inputs than projected tokens, such as attention, are computed only for a method that requires them.
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
    """The size of a LLaVA-1.6 picture and of the grid of its tiles."""

    height: int  # pixels
    width: int
    rows: int  # tiles
    columns: int

    @property
    def num_crops(self) -> int:
        """The overview and the tiles."""
        return 1 + self.rows * self.columns


class Pruner:
    """The encoder of a checkpoint and one method. The method keeps `k` tokens of a square picture."""

    def __init__(self, checkpoint: Checkpoint, prune: PruneConfig, settings: dict[str, Any], place: Place):
        """Loads the encoder. `settings` are the method's, resolved for the checkpoint."""
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
        elif prune.per_tile or requires:  # attention, keys and relevance exist only for each crop by itself
            self.lay_out = self._crop_by_crop
        else:
            self.lay_out = self._choose_among_all

    @property
    def per_prompt(self) -> bool:
        """Whether the kept tokens depend on the prompt."""
        return self.method.per_prompt

    def __call__(
        self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]], sizes: np.ndarray | None = None
    ) -> list[list[Kept]]:
        """The kept tokens of each picture of a batch: a list of one `Kept`, or of one for each prompt.

        Args:
            pixels: uint8 [B, H, H, 3]; of LLaVA-1.6 crops, uint8 [B, T, H, H, 3] (`tiles.stack_pictures`).
            seeds: int64 [B], one for each picture.
            prompts: the prompts of each picture.
            sizes: int32 [B, 4], height, width, rows and columns of each picture of LLaVA-1.6.
        """
        if sizes is None:
            return self._prune_squares(pixels, seeds, prompts)
        pictures = [Picture(*size) for size in sizes.tolist()]
        # A picture with fewer crops than T ends in crops of zeros, which are cut off here.
        crops = torch.cat([padded[: picture.num_crops] for padded, picture in zip(pixels, pictures, strict=True)])
        return self.lay_out(crops, seeds, prompts, pictures)

    def _prune_squares(self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]]) -> list[list[Kept]]:
        """The kept tokens of square pictures or crops, pixels [B, H, H, 3], each pruned by itself."""
        reduced_pictures = self.reduce(self._encode(pixels, seeds, prompts), self.k)
        return [[self._kept(reduced) for reduced in picture] for picture in reduced_pictures]

    def _encode(self, pixels: Tensor, seeds: Tensor, prompts: list[list[str]]) -> Seen:
        """The inputs of the method: features, and whatever else the method requires."""
        hidden = self.encoder.see(pixels)
        patches, attention, keys, relevance = self.encoder.patches(hidden), None, None, None
        features = patches if self.method.before_projector else self.encoder.project(patches)
        if "class_attention" in self.method.requires:
            attention, keys = self.encoder.class_attention(hidden)
        if self.relevance is not None:
            # Relevance is computed for pairs of a picture and a prompt: a picture is repeated for each of its prompts.
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
        """The result of a method as projected tokens."""
        tokens = self.encoder.project(reduced.features) if self.method.before_projector else reduced.features
        return Kept(tokens, reduced.source, num_visual)

    # LLaVA-1.6: three ways to prune the crops of a picture. `__init__` chooses one of them for the method.

    def _choose_among_all(
        self, crops: Tensor, seeds: Tensor, prompts: list[list[str]], pictures: list[Picture]
    ) -> list[list[Kept]]:
        """Prunes all tokens of a picture together, including newline tokens and overview, as the released code does."""
        kept = []
        for features, picture, seed, texts in zip(
            self._features(crops, pictures), pictures, seeds, prompts, strict=True
        ):
            packed = self._pack(features, picture)
            inputs = Seen(features=packed[None], seeds=seed[None].to(packed.device), prompts=[texts])
            (reduced_by_prompt,) = self.reduce(inputs, num_kept(self.retention, len(packed)))
            kept.append([self._kept(reduced, len(packed)) for reduced in reduced_by_prompt])
        return kept

    def _pack_crops(
        self, crops: Tensor, seeds: Tensor, prompts: list[list[str]], pictures: list[Picture]
    ) -> list[list[Kept]]:
        """Reduces each crop to a smaller square of tokens, then packs the squares as unpruned crops are packed."""
        kept = []
        for features, picture, seed in zip(self._features(crops, pictures), pictures, seeds, strict=True):
            num_visual = len(self._pack(features[..., :1], picture))  # one channel is enough to count tokens
            inputs = Seen(features=features, seeds=seed.expand(len(features)), prompts=[[]] * len(features))
            squares = torch.stack([reduced.features for (reduced,) in self.reduce(inputs, self.k)])
            tokens = self._pack(squares, picture)
            source = torch.arange(num_visual) if self.method.keeps_all else torch.full((len(tokens),), -1)
            kept.append([Kept(tokens, source, num_visual)])
        return kept

    def _crop_by_crop(
        self, crops: Tensor, seeds: Tensor, prompts: list[list[str]], pictures: list[Picture]
    ) -> list[list[Kept]]:
        """Prunes each crop as if it were a picture of its own. There are no newline tokens."""
        counts = [picture.num_crops for picture in pictures]
        owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
        # Each crop adds its number to the picture's seed, so that no two crops draw the same random tokens.
        numbers = torch.cat([torch.arange(count) for count in counts])
        kept_crops = iter(self._prune_squares(crops, seeds[owners] + numbers, [prompts[owner] for owner in owners]))
        crops_by_picture = [[next(kept_crops) for _ in range(count)] for count in counts]
        num_tokens = self.encoder.num_tokens
        return [
            [join_crops(prompt_crops, num_tokens) for prompt_crops in zip(*picture_crops, strict=True)]
            for picture_crops in crops_by_picture
        ]

    def _features(self, crops: Tensor, pictures: list[Picture]) -> tuple[Tensor, ...]:
        """For each picture, the projected tokens [T, N, D] of its T crops."""
        return self.encoder(crops).split([picture.num_crops for picture in pictures])

    def _pack(self, crops_TND: Tensor, picture: Picture) -> Tensor:
        """The tokens [K, D] of a picture in LLaVA-1.6's order: overview, then the rows of tiles with newline tokens."""
        assert self.encoder.newline is not None, "tiles are LLaVA-1.6's"
        newline = self.encoder.newline[: crops_TND.shape[-1]]  # shorter only where tokens are merely counted
        grid, size = (picture.rows, picture.columns), (picture.height, picture.width)
        return pack_tiles(crops_TND, newline_D=newline, grid=grid, image_size=size)


def join_crops(crops: Sequence[Kept], num_tokens: int) -> Kept:
    """The kept tokens of one picture from those of its crops, in order.

    A crop has `num_tokens` tokens before pruning; sources count through all crops, and negative sources stay.
    """
    sources = [
        torch.where(kept.source < 0, kept.source, kept.source + number * num_tokens)
        for number, kept in enumerate(crops)
    ]
    return Kept(torch.cat([kept.tokens for kept in crops]), torch.cat(sources), len(crops) * num_tokens)
