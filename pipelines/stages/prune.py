"""Prunes the visual tokens of pictures with any method: the heart of the encode stage.

A batch of pictures goes through the vision tower and then through the method, which keeps some of each picture's visual
tokens. The result is one `Kept` for each picture, or one for each prompt of each picture if the method looks at the
prompt. Other inputs than projected tokens, such as attention, are computed only for a method that requires them.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otprune import num_kept
from otprune.families import Size, Way
from otprune.merge import merge_leftovers
from otprune.methods import get_method
from otprune.methods.reduction import Reduced, Seen
from otprune.models import Checkpoint, Encoder, Kept, Region, load_encoder
from otprune.models.relevance import Relevance, make_relevance
from pipelines.config.keys import PruneConfig
from pipelines.stages.gpu import Place


class Pruner:
    """The encoder of a checkpoint and one method."""

    def __init__(self, checkpoint: Checkpoint, prune: PruneConfig, settings: dict[str, Any], place: Place):
        """Loads the encoder. `settings` are the method's, resolved for the checkpoint."""
        self.method = get_method(prune.method)
        checked, requires = self.method.check(settings), self.method.requires
        dtype, device = place.torch_dtype, place.device
        by_saliency = "saliency" in self.method.wishes and checkpoint.class_attention
        self.encoder: Encoder = load_encoder(
            checkpoint,
            dtype=dtype,
            device=device,
            attention="class_attention" in requires,
            saliency=by_saliency,
        )
        self.relevance: Relevance | None = None
        if "relevance" in requires:
            self.relevance = make_relevance(checked, checkpoint.path, dtype, device)
        self.reduce = self.method.build(checked, {"gamma": prune.gamma, "gamma_scale": prune.gamma_scale})
        self.merge = prune.merge
        self.retention = 1.0 if self.method.keeps_all else prune.share_of_sent
        self.way: Way = "joint"
        if self.method.keeps_grid:
            self.way = "grid"
        elif prune.per_tile or requires or by_saliency:  # these inputs exist only for each crop by itself
            self.way = "tiles"

    @property
    def per_prompt(self) -> bool:
        """Whether the kept tokens depend on the prompt."""
        return self.method.per_prompt

    def __call__(
        self, pictures: Sequence[Tensor], sizes: Sequence[Size], seeds: Sequence[int], prompts: list[list[str]]
    ) -> list[list[Kept]]:
        """The kept tokens of each picture of a batch: a list of one `Kept`, or of one for each prompt.

        Regions with equal numbers of tokens go through the method together.

        Args:
            pictures: the frame of each picture, uint8 of `Frame.shape`.
            sizes: (height, width) of each picture as the user gave it.
            seeds: one for each picture.
            prompts: the prompts of each picture.
        """
        early = self.method.before_projector
        regions_by_picture = self.encoder.regions(pictures, sizes, self.way, before_projector=early)
        places = [(i, j) for i, regions in enumerate(regions_by_picture) for j in range(len(regions))]
        by_count: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for i, j in places:
            by_count[len(regions_by_picture[i][j].features)].append((i, j))
        kept: dict[tuple[int, int], list[Kept]] = {}
        for count, group in by_count.items():
            regions = [regions_by_picture[i][j] for i, j in group]
            # A region adds its number to the picture's seed, so that no two crops draw the same random tokens.
            group_seeds = torch.tensor([seeds[i] for i, _ in group]) + torch.tensor([j for _, j in group])
            seen = self._seen(regions, group_seeds, [prompts[i] for i, _ in group], [i for i, _ in group])
            answers = self.reduce(seen, num_kept(self.retention, count))
            for place, region, answer in zip(group, regions, answers, strict=True):
                kept[place] = [self._kept(region, reduced) for reduced in answer]
        joined = []
        for i, (size, regions) in enumerate(zip(sizes, regions_by_picture, strict=True)):
            by_prompt = zip(*(kept[i, j] for j in range(len(regions))), strict=True)
            joined.append([self.encoder.join(size, parts, self.way, before_projector=early) for parts in by_prompt])
        return joined

    def _seen(
        self, regions: Sequence[Region], seeds: Tensor, prompts: list[list[str]], pictures: Sequence[int]
    ) -> Seen:
        """The inputs of the method for regions of equally many tokens."""
        features = torch.stack([region.features for region in regions])
        relevance = None
        if self.relevance is not None:
            stacked = _stacked([region.patches for region in regions])
            patches = features if stacked is None else stacked
            # Relevance is computed for pairs of a picture and a prompt: a picture is repeated for each of its prompts.
            owner = [picture for picture, texts in enumerate(prompts) for _ in texts]
            texts = [text for texts in prompts for text in texts]
            relevance = self.relevance(patches[owner], features[owner], texts)
        return Seen(
            features=features,
            seeds=seeds.to(features.device),
            prompts=prompts,
            pictures=pictures,
            keys=_stacked([region.keys for region in regions]),
            class_attention=_stacked([region.class_attention for region in regions]),
            relevance=relevance,
            saliency=_stacked([region.saliency for region in regions]),
            patches=_stacked([region.patches for region in regions]) if "patches" in self.method.wishes else None,
        )

    def _kept(self, region: Region, reduced: Reduced) -> Kept:
        """What a method left of a region, as rows of the language model."""
        if self.merge is not None and len(reduced.source) < len(region.features):
            rows = region.features if region.rows is None else region.rows
            tokens = merge_leftovers(rows, region.features, reduced.source, self.merge)
        else:
            tokens = reduced.features if region.rows is None else region.rows[reduced.source]
        return Kept(tokens, reduced.source, len(region.features))


def _stacked(values: Sequence[Tensor | None]) -> Tensor | None:
    """The values as one tensor; None if the encoder did not compute them."""
    present = [value for value in values if value is not None]
    return torch.stack(present) if present else None
