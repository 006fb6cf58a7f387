"""Stage "vision": the tower, the projector and the word embeddings learn to say what every patch shows.

Each patch's projected feature, normalised, must point at the *word embeddings* of its colour, its kind, its size and
its place, so the language model later finds visual tokens that already speak its words. What else mattered, in order:

* windows of 8 x 8 patches centred on items, at their true absolute positions, for 85 % of the steps: 4 times cheaper
  and 4 times denser in items; whole images close the gap at the end
* a PCA-whitened patch embedding, without which mean colour drowns geometry, and 2-D sine position embeddings
* predicting object masks in 2 x 2 pixel cells from layer 2: kinds stay on a plateau for long without it
* a class token that must name the whole scene, so that its attention means something

Shape suffixes: B images, N visual tokens, D vision width, M = B * N patches.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demo import labels as lab
from demo.language import COLUMNS, ROWS
from demo.model import VISION_WIDTH, encode_patches, to_pixels
from demo.render import render
from demo.training import autocast
from demo.world import BACKGROUNDS, COLORS, DIGITS, GRID, KINDS, MAX_SHAPES, PATCH, RADII, Scene, scene_at

WINDOW = 8  # patches along a side
WINDOWS_PER_SCENE = 4  # one drawing feeds several windows: drawing costs as much as half a window's training
_JITTER = 2  # patches by which a window may miss its item's centre
_BACKGROUND_PATCH = 0.15  # weight of a background patch in the attribute losses, an item's patch counts 1
_PAIRS = [(color, kind) for color in COLORS for kind in KINDS]
_CLASS_SPLIT = [
    len(_PAIRS),
    MAX_SHAPES + 1,
    len(DIGITS) + 1,
    len(BACKGROUNDS),
]  # pairs, count, digit or none, background


class Batch(NamedTuple):
    """uint8 [B, H, W, 3], raster numbers [B, N], `demo.labels` [B, N, 7] and [B, N, 49], and the scenes."""

    pixels: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    scenes: list[Scene]


class VisionHeads(nn.Module):
    """Linear read-outs that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(VISION_WIDTH, GRID)
        self.y = nn.Linear(VISION_WIDTH, GRID)
        self.mask = nn.Linear(VISION_WIDTH, lab.CELL**2)
        self.scene = nn.Linear(VISION_WIDTH, sum(_CLASS_SPLIT))


def window_batch(scenes: list[Scene], rng: np.random.Generator) -> Batch:
    """`WINDOWS_PER_SCENE` windows of each scene, each around an item of it; a digit counts twice, being rarer."""
    parts = []
    for scene in scenes:
        drawing = render(scene)
        marks, masks = lab.patch_labels(scene, drawing.alpha), lab.patch_masks(drawing.alpha)
        targets = scene.items + ((scene.digit,) if scene.digit else ())
        for _ in range(WINDOWS_PER_SCENE):
            item = targets[rng.integers(len(targets))]
            top, left = (
                int(np.clip(round(center / PATCH - WINDOW / 2 + rng.uniform(-_JITTER, _JITTER)), 0, GRID - WINDOW))
                for center in (item.y, item.x)
            )
            places = ((np.arange(WINDOW)[:, None] + top) * GRID + np.arange(WINDOW) + left).ravel()
            cut = (slice(top * PATCH, (top + WINDOW) * PATCH), slice(left * PATCH, (left + WINDOW) * PATCH))
            parts.append((drawing.pixels[cut], places, marks[places], masks[places]))
    return Batch(*(np.stack(column) for column in zip(*parts, strict=True)), scenes)


def whole_batch(scenes: list[Scene]) -> Batch:
    drawings = [render(scene) for scene in scenes]
    marks = [lab.patch_labels(scene, drawing.alpha) for scene, drawing in zip(scenes, drawings, strict=True)]
    return Batch(
        np.stack([drawing.pixels for drawing in drawings]),
        np.tile(np.arange(GRID**2), (len(scenes), 1)),
        np.stack(marks),
        np.stack([lab.patch_masks(drawing.alpha) for drawing in drawings]),
        scenes,
    )


@torch.no_grad()
def initialise_tower(model: LlavaForConditionalGeneration, first_train_scene: int) -> None:
    """Whiten the patch embedding over patches of training windows; write sines into the position embeddings."""
    embeddings = model.model.vision_tower.embeddings
    scenes = [scene_at("train", first_train_scene + index) for index in range(100)]
    pixels = to_pixels(window_batch(scenes, np.random.default_rng(0)).pixels)
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
    mean = patches.mean(0)
    centred = (patches - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0)[:VISION_WIDTH], vectors.flip(1)[:, :VISION_WIDTH]
    vectors = vectors * vectors.sum(0).sign()  # eigenvectors have no sign of their own
    whiten = 0.5 * (vectors / (values + values[VISION_WIDTH // 2]).sqrt()).T.float()
    embeddings.patch_embedding.weight.copy_(whiten.view(VISION_WIDTH, 3, PATCH, PATCH))
    embeddings.position_embedding.weight[0] = 0
    embeddings.position_embedding.weight[1:] = 0.5 * _sines(GRID, VISION_WIDTH) - whiten @ mean
    embeddings.class_embedding.mul_(0.5)


def _sines(side: int, width: int) -> Tensor:
    """[side * side, width]: sines and cosines of the row in the first half, of the column in the second."""
    frequency = 1 / 60 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def vision_loss(
    model: LlavaForConditionalGeneration, heads: VisionHeads, words: dict[int, Tensor], batch: Batch, *, whole: bool
) -> tuple[Tensor, dict[str, float]]:
    """The sum of all patch losses (and, for whole images, the scene loss), and accuracies on item patches."""
    device = heads.x.weight.device
    with autocast(device):
        places = torch.from_numpy(batch.places).to(device)
        tower = model.model.vision_tower
        middle, features, scene_token = encode_patches(tower, to_pixels(batch.pixels, device), places, whole=whole)
        visual = model.model.multi_modal_projector(features)
    visual, features = visual.float().flatten(0, 1), features.float().flatten(0, 1)
    marks = torch.from_numpy(batch.labels).to(device).flatten(0, 1).long()
    is_item = (marks[:, lab.KIND] >= 0) & (marks[:, lab.KIND] < lab.NOTHING)
    weight = torch.where(is_item, 1.0, _BACKGROUND_PATCH)
    speak = F.rms_norm(visual, visual.shape[-1:]) @ model.model.language_model.embed_tokens.weight.T

    loss, numbers = 1e-3 * (visual.square().mean() - 1).square(), {}  # keeps the scale of visual tokens bounded
    for label, name, factor in _SPOKEN:
        logits = speak[:, words[label]]
        loss = loss + factor * _weighted_cross_entropy(logits, marks[:, label], weight)
        numbers[name] = _accuracy(logits, marks[:, label], is_item)
    for label, head in ((lab.X_BIN, heads.x), (lab.Y_BIN, heads.y)):
        loss = loss + 0.4 * _weighted_cross_entropy(head(features), marks[:, label], weight)
    tint = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in batch.scenes], device=device)
    is_empty = marks[:, lab.KIND] == lab.NOTHING
    tint = tint.repeat_interleave(len(marks) // len(batch.scenes))
    loss = loss + 0.3 * F.cross_entropy(speak[:, words[_TINT]][is_empty], tint[is_empty])

    masks = torch.from_numpy(batch.masks).to(device).flatten(0, 1)
    per_patch = F.binary_cross_entropy_with_logits(heads.mask(middle.float().flatten(0, 1)), masks, reduction="none")
    loss = loss + 2 * _weighted_mean(per_patch.mean(1), torch.where(is_empty, 0.1, 1.0))
    if scene_token is not None:
        loss = loss + _scene_loss(heads.scene(scene_token.float()), batch.scenes)
    return loss, numbers


_TINT = -1
_SPOKEN = [
    (lab.COLOR, "color", 1),
    (lab.KIND, "kind", 2),
    (lab.SIZE, "size", 1),
    (lab.ROW, "row", 1),
    (lab.COLUMN, "column", 1),
]


def word_groups(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[int, Tensor]:
    """Label column -> ids of the words that its values are called."""
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
    """Which (colour, kind) pairs are there, how many shapes, which digit, which background."""
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


def _accuracy(logits: Tensor, target: Tensor, where: Tensor) -> float:
    where = where & (target != lab.IGNORE)
    return (logits.argmax(1) == target)[where].float().mean().item()
