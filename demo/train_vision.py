"""Stage "vision": the tower, the projector and the word embeddings learn what every patch shows.

The normalised, projected feature of each patch must point at the *word embeddings* of its colour, kind, size and place.
Visual tokens then have the meaning of words before the language model is trained. What else mattered, in this order:

* windows of 8 x 8 patches centred on items, at their true absolute positions, for 85 % of the steps: they are 4 times
  cheaper and 4 times denser in items. Whole images at the end close the gap.
* a PCA-whitened patch embedding, because otherwise the mean colour hides the geometry, and 2-D sine position embeddings
* predicting object masks in 2 x 2 pixel cells from layer 2: without it, kinds stay on a plateau for long
* a class token that must name the whole scene, so that its attention is meaningful

Shape suffixes: B images, N visual tokens, D vision width, M = B * N patches.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demo import labels as lab
from demo.language import COLUMNS, ROWS
from demo.model import VISION_WIDTH, encode_patches, to_pixels
from demo.training import autocast
from demo.vision_data import Batch, window_batch
from demo.world import BACKGROUNDS, COLORS, DIGITS, GRID, KINDS, MAX_SHAPES, PATCH, RADII, Scene, scene_at

_BACKGROUND_PATCH = 0.15  # weight of a background patch in the attribute losses; a patch of an item has weight 1
_PAIRS = [(color, kind) for color in COLORS for kind in KINDS]
_CLASS_SPLIT = [
    len(_PAIRS),
    MAX_SHAPES + 1,
    len(DIGITS) + 1,
    len(BACKGROUNDS),
]  # pairs, count, digit or none, background


class VisionHeads(nn.Module):
    """Linear heads that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(VISION_WIDTH, GRID)
        self.y = nn.Linear(VISION_WIDTH, GRID)
        self.mask = nn.Linear(VISION_WIDTH, lab.CELL**2)
        self.scene = nn.Linear(VISION_WIDTH, sum(_CLASS_SPLIT))


@torch.no_grad()
def initialise_tower(model: LlavaForConditionalGeneration, first_train_scene: int) -> None:
    """Set the patch embedding to a PCA whitening of training patches, and the position embeddings to sines."""
    embeddings = model.model.vision_tower.embeddings
    scenes = [scene_at("train", first_train_scene + index) for index in range(100)]
    pixels = to_pixels(window_batch(scenes, np.random.default_rng(0)).pixels)
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
    mean = patches.mean(0)
    centred = (patches - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0)[:VISION_WIDTH], vectors.flip(1)[:, :VISION_WIDTH]
    vectors = vectors * vectors.sum(0).sign()  # fixes the sign, which an eigenvector leaves open
    whiten = 0.5 * (vectors / (values + values[VISION_WIDTH // 2]).sqrt()).T.float()
    embeddings.patch_embedding.weight.copy_(whiten.view(VISION_WIDTH, 3, PATCH, PATCH))
    embeddings.position_embedding.weight[0] = 0
    embeddings.position_embedding.weight[1:] = 0.5 * _sines(GRID, VISION_WIDTH) - whiten @ mean
    embeddings.class_embedding.mul_(0.5)


def _sines(side: int, width: int) -> Tensor:
    """[side * side, width]: sines and cosines of the row in the first half, of the column in the second half."""
    frequency = 1 / 60 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def vision_loss(
    model: LlavaForConditionalGeneration, heads: VisionHeads, words: dict[int, Tensor], batch: Batch, *, whole: bool
) -> tuple[Tensor, dict[str, float]]:
    """The sum of all patch losses, with the scene loss for whole images; and the accuracies on patches of items."""
    device = heads.x.weight.device
    with autocast(device):
        places = torch.from_numpy(batch.places).to(device)
        tower = model.model.vision_tower
        middle, features, scene_token = encode_patches(tower, to_pixels(batch.pixels, device), places, whole=whole)
        visual = model.model.multi_modal_projector(features)
    middle, features, visual = (part.float().flatten(0, 1) for part in (middle, features, visual))
    marks, masks = (torch.from_numpy(part).to(device).flatten(0, 1) for part in (batch.labels, batch.masks))
    marks = marks.long()
    speak = F.rms_norm(visual, visual.shape[-1:]) @ model.model.language_model.embed_tokens.weight.T

    bounded = 1e-3 * (visual.square().mean() - 1).square()  # keeps the mean square of visual tokens near 1
    named, numbers = _named_loss(speak, marks, words)
    placed = _place_loss(heads, features, marks)
    tinted = _tint_loss(speak[:, words[_TINT]], marks, batch.scenes)
    masked = _mask_loss(heads.mask(middle), masks, marks)
    loss = bounded + named + 0.4 * placed + 0.3 * tinted + 2 * masked
    if scene_token is not None:
        loss = loss + _scene_loss(heads.scene(scene_token.float()), batch.scenes)
    return loss, numbers


def _named_loss(speak: Tensor, marks: Tensor, words: dict[int, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of each attribute's word among its words; also the accuracy on patches of items."""
    is_item = (marks[:, lab.KIND] >= 0) & (marks[:, lab.KIND] < lab.NOTHING)
    losses, numbers = [], {}
    for label, name, factor in _SPOKEN:
        logits, target = speak[:, words[label]], marks[:, label]
        losses.append(factor * _weighted_cross_entropy(logits, target, _patch_weight(marks)))
        known = is_item & (target != lab.IGNORE)
        numbers[name] = (logits.argmax(1) == target)[known].float().mean().item()
    return torch.stack(losses).sum(), numbers


def _place_loss(heads: VisionHeads, features: Tensor, marks: Tensor) -> Tensor:
    """Cross entropy of the patch column and row of the item's centre."""
    weight = _patch_weight(marks)
    columns = _weighted_cross_entropy(heads.x(features), marks[:, lab.X_BIN], weight)
    return columns + _weighted_cross_entropy(heads.y(features), marks[:, lab.Y_BIN], weight)


def _tint_loss(logits: Tensor, marks: Tensor, scenes: list[Scene]) -> Tensor:
    """Cross entropy of the background's colour on background patches."""
    tints = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes], device=logits.device)
    is_empty = marks[:, lab.KIND] == lab.NOTHING
    return F.cross_entropy(logits[is_empty], tints.repeat_interleave(len(marks) // len(scenes))[is_empty])


def _mask_loss(logits: Tensor, masks: Tensor, marks: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1)
    return _weighted_mean(losses, torch.where(marks[:, lab.KIND] == lab.NOTHING, 0.1, 1.0))


def _patch_weight(marks: Tensor) -> Tensor:
    is_item = (marks[:, lab.KIND] >= 0) & (marks[:, lab.KIND] < lab.NOTHING)
    return torch.where(is_item, 1.0, _BACKGROUND_PATCH)


_TINT = -1
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
        lab.KIND: [*KINDS, *DIGITS, "background"],
        lab.SIZE: list(RADII),
        lab.ROW: ROWS,
        lab.COLUMN: COLUMNS,
        _TINT: list(BACKGROUNDS),
    }
    return {
        label: torch.tensor(tokenizer.convert_tokens_to_ids(group), device=device) for label, group in groups.items()
    }


def _scene_loss(logits: Tensor, scenes: list[Scene]) -> Tensor:
    """Loss of the class token: (colour, kind) pairs in the scene, number of shapes, digit and background."""
    pairs = torch.zeros(len(scenes), len(_PAIRS))
    for row, scene in enumerate(scenes):
        for shape in scene.shapes:
            pairs[row, _PAIRS.index((shape.color, shape.kind))] = 1
    counts = [len(scene.shapes) for scene in scenes]
    digits = [int(scene.digit.value) if scene.digit else len(DIGITS) for scene in scenes]
    tints = [list(BACKGROUNDS).index(scene.background) for scene in scenes]
    present, *answers = logits.split(_CLASS_SPLIT, 1)
    present_loss = F.binary_cross_entropy_with_logits(
        present, pairs.to(logits.device), pos_weight=torch.tensor(5.0, device=logits.device)
    )
    choices = zip(answers, (counts, digits, tints), strict=True)
    return 4 * present_loss + 0.3 * sum(
        F.cross_entropy(guess, torch.tensor(truth, device=logits.device)) for guess, truth in choices
    )


def _weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, target.clamp(min=0), reduction="none")
    return _weighted_mean(losses, weight * (target != lab.IGNORE))


def _weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    return (losses * weight).sum() / weight.sum().clamp(min=1e-6)
