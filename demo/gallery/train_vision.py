"""Stage "vision": tower, merger and word embeddings learn what every cell shows.

The normalised visual token of each cell must point at the *word embeddings* of its colour, kind or word, size and
place. Visual tokens then have the meaning of words before the language model is trained. Small crowded pictures for
most of the steps, pictures of all sizes at the end; a PCA-whitened patch embedding; opacities of things, predicted from
the second layer. The first demo's recipe says what each of these is good for (`demo.train_vision`).

Shape suffixes: B pictures of one size, N visual tokens, P = 4 N patches, D width.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from demo.gallery import labels as lab
from demo.gallery.model import VISION_WIDTH, encode, to_patches
from demo.gallery.render import render
from demo.gallery.world import PATCH, TEXTURES, Scene, scene_at
from demo.language import COLUMNS, ROWS
from demo.training import autocast
from demo.world import BACKGROUNDS, COLORS, RADII

_EMPTY_CELL = 0.15  # weight of a background cell in the attribute losses; a cell of a thing has weight 1


class Batch(NamedTuple):
    """Pictures of one size with their labels."""

    pixels: np.ndarray  # uint8 [B, H, W, 3]
    labels: np.ndarray  # int8 [B, N, 5], see `demo.gallery.labels.cell_labels`
    masks: np.ndarray  # float32 [B, P, 49], see `demo.gallery.labels.patch_masks`
    scenes: list[Scene]


def draw_batch(scenes: list[Scene]) -> Batch:
    drawings = [render(scene) for scene in scenes]
    marks = [lab.cell_labels(scene, drawing.alpha) for scene, drawing in zip(scenes, drawings, strict=True)]
    masks = [lab.patch_masks(drawing.alpha) for drawing in drawings]
    return Batch(np.stack([drawing.pixels for drawing in drawings]), np.stack(marks), np.stack(masks), scenes)


@torch.no_grad()
def initialise_tower(model: Qwen2_5_VLForConditionalGeneration, first_train_scene: int) -> None:
    """Sets the patch embedding to a PCA whitening of training patches, half of it for each of the two equal frames."""
    images = [render(scene_at("train", first_train_scene + index, (6, 6))).pixels for index in range(60)]
    patches = to_patches(np.stack(images)).view(-1, 3, 2, PATCH * PATCH)[:, :, 0].flatten(1)
    centred = (patches - patches.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0)[:VISION_WIDTH], vectors.flip(1)[:, :VISION_WIDTH]
    vectors = vectors * vectors.sum(0).sign()  # fixes the sign, which an eigenvector leaves open
    whiten = 0.5 * (vectors / (values + values[VISION_WIDTH // 2]).sqrt()).T.float()
    weight = model.model.visual.patch_embed.proj.weight  # [D, 3, 2, 14, 14], without a bias
    weight.copy_(0.5 * whiten.view(VISION_WIDTH, 3, 1, PATCH, PATCH).expand_as(weight))


def vision_loss(
    model: Qwen2_5_VLForConditionalGeneration, mask_head: nn.Linear, words: dict[int, Tensor], batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """The sum of all losses, and the accuracies on cells of things."""
    device = model.device
    with autocast(device):
        visual, middle = encode(model, batch.pixels)
        masks = mask_head(middle)
    visual, masks = visual.float().flatten(0, 1), masks.float().flatten(0, 1)
    marks = torch.from_numpy(batch.labels).to(device).flatten(0, 1).long()
    speak = F.rms_norm(visual, visual.shape[-1:]) @ model.model.language_model.embed_tokens.weight.T
    is_thing = (marks[:, lab.KIND] >= 0) & (marks[:, lab.KIND] < lab.NOTHING)
    weight = torch.where(is_thing, 1.0, _EMPTY_CELL)

    loss = 1e-3 * (visual.square().mean() - 1).square()  # keeps the mean square of visual tokens near 1
    numbers = {}
    for label, name, factor in _SPOKEN:
        logits, target = speak[:, words[label]], marks[:, label]
        loss = loss + factor * _weighted_cross_entropy(logits, target, weight)
        known = is_thing & (target != lab.IGNORE)
        numbers[name] = (logits.argmax(1) == target)[known].float().mean().item()
    is_empty = marks[:, lab.KIND] == lab.NOTHING
    for label, names, of in ((_TINT, list(BACKGROUNDS), "background"), (_TEXTURE, TEXTURES, "texture")):
        truth = torch.tensor([names.index(getattr(scene, of)) for scene in batch.scenes], device=device)
        each = truth.repeat_interleave(len(marks) // len(batch.scenes))[is_empty]
        logits = speak[:, words[label]][is_empty]
        loss = loss + 0.3 * F.cross_entropy(logits, each)
        numbers[of] = (logits.argmax(1) == each).float().mean().item()
    truth = torch.from_numpy(batch.masks).to(device).flatten(0, 1)
    drawn = torch.where(truth.amax(1) > 0, 1.0, 0.1)
    losses = F.binary_cross_entropy_with_logits(masks, truth, reduction="none").mean(1)
    return loss + 2 * (losses * drawn).sum() / drawn.sum(), numbers


_TINT, _TEXTURE = -1, -2
_SPOKEN = [
    (lab.COLOR, "color", 1),
    (lab.KIND, "kind", 2),
    (lab.SIZE, "size", 1),
    (lab.ROW, "row", 1),
    (lab.COLUMN, "column", 1),
]


def word_groups(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[int, Tensor]:
    """{label column: token ids of the words for its values}."""
    groups = {
        lab.COLOR: list(COLORS),
        lab.KIND: lab.KIND_WORDS,
        lab.SIZE: list(RADII),
        lab.ROW: ROWS,
        lab.COLUMN: COLUMNS,
        _TINT: list(BACKGROUNDS),
        _TEXTURE: TEXTURES,
    }
    return {
        label: torch.tensor(tokenizer.convert_tokens_to_ids(group), device=device) for label, group in groups.items()
    }


def _weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, target.clamp(min=0), reduction="none")
    weight = weight * (target != lab.IGNORE)
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6)
