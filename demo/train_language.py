"""Stages "words" and "answers": projector and language model learn to caption and to answer; the tower is frozen.

The tower's features of the training scenes are computed once and stored on disk. Each step packs a dozen questions
behind every image (`demo.packing`).

* "words": 64 of 256 visual tokens, namely all patches of items and random background, so a step costs a third
* "answers": 256 (half of the steps), 128 or 64 tokens selected in this way; at the end only 256. Counting needs this
  stage.

The language model thus learns from images without some of their background tokens, but never without an item.

Departures from the recipe that made the shipped checkpoint: more relation and multiple-choice questions, and a
text-only exercise that teaches the hard half of multiple choice: finding the letter in front of a known option.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demo import labels as lab
from demo.language import CAPTION_PROMPT, TASKS, caption, question
from demo.model import VISION_WIDTH, encode_patches, to_pixels
from demo.packing import Asked, answer_logits, pack, prefix_ids
from demo.render import render
from demo.training import autocast
from demo.world import COLORS, GRID, KINDS, Scene, scene_at

CHUNK = 256  # scenes in one feature file; a killed run loses at most one file
_NUM_PATCHES = GRID**2


def ask(scene: Scene, rng: random.Random, extra: Sequence[str] = ()) -> list[Asked]:
    """The caption and a question of each task, also of those in `extra` ("letter" is the exercise), where possible."""
    asked = [Asked("caption", CAPTION_PROMPT, caption(scene))]
    for task in (*TASKS, *extra):
        pair = _letter_exercise(rng) if task == "letter" else question(scene, task, rng)
        if pair:
            asked.append(Asked(task, *pair))
    return asked


def _letter_exercise(rng: random.Random) -> tuple[str, str]:
    options = rng.sample(list(COLORS) if rng.random() < 0.5 else KINDS, 4)
    number = rng.randrange(4)
    listed = " ".join(f"{letter} {option}" for letter, option in zip("ABCD", options, strict=True))
    return f"what answer is {options[number]} ? {listed}", "ABCD"[number]


def cache_features(
    model: LlavaForConditionalGeneration, first: int, count: int, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Features of `count` scenes, bfloat16 bits as int16 [count, N, D]; whether a patch is an item, bool [count, N]."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, count, CHUNK):
        path = folder / f"features-{start:06d}.npz"
        if not path.is_file():
            scenes = [scene_at("train", first + index) for index in range(start, min(start + CHUNK, count))]
            features, occupied = _encode_scenes(model, scenes)
            np.savez(path.with_suffix(".tmp.npz"), features=features, occupied=occupied)
            path.with_suffix(".tmp.npz").replace(path)
        paths.append(path)
    chunks = [np.load(path) for path in paths]
    features, occupied = (np.concatenate([chunk[name] for chunk in chunks]) for name in ("features", "occupied"))
    return features, occupied


@torch.no_grad()
def _encode_scenes(model: LlavaForConditionalGeneration, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    features, occupied = [], []
    for start in range(0, len(scenes), 16):
        batch = scenes[start : start + 16]
        drawings = [render(scene) for scene in batch]
        with autocast(model.device):
            encoded = scene_features(model, np.stack([drawing.pixels for drawing in drawings]))
        features.append(encoded.bfloat16().view(torch.int16).cpu().numpy())
        for scene, drawing in zip(batch, drawings, strict=True):
            occupied.append(lab.patch_labels(scene, drawing.alpha)[:, lab.KIND] != lab.NOTHING)
    return np.concatenate(features), np.stack(occupied)


def scene_features(model: LlavaForConditionalGeneration, images: np.ndarray) -> Tensor:
    """The tower's features [B, N, D], before the projector, of images uint8 [B, 224, 224, 3]."""
    places = torch.arange(_NUM_PATCHES, device=model.device).expand(len(images), -1)
    return encode_patches(model.model.vision_tower, to_pixels(images, model.device), places, whole=True)[1]


def language_loss(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features_BND: Tensor,
    asked: list[list[Asked]],
) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross entropy of all answers, and the share of answer tokens that are right."""
    packed = pack(asked, tokenizer, features_BND.shape[1])
    with autocast(features_BND.device):
        visual = model.model.multi_modal_projector(features_BND)
        logits, is_target = answer_logits(model, prefix_ids(tokenizer), visual, packed)
    targets, weights = (part.to(logits.device)[is_target] for part in (packed.targets, packed.weights))
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    right = (logits.argmax(1) == targets).float().mean().item()
    return (losses * weights).sum() / weights.sum(), {"tokens_right": right}


def load_batch(
    features: np.ndarray, occupied: np.ndarray, index: np.ndarray, keep: int, rng: np.random.Generator
) -> Tensor:
    """Features float32 [B, keep, D] of the kept patches in raster order: all items, then random background."""
    rows = torch.from_numpy(features[index]).view(torch.bfloat16).float()
    if keep == _NUM_PATCHES:
        return rows
    # Random ranks in [0, 1), lowered by 1 for items: the smallest ranks are all items, then random background.
    order = rng.random((len(index), _NUM_PATCHES)) - occupied[index]
    kept = torch.from_numpy(np.sort(np.argsort(order, 1)[:, :keep], 1))
    return rows.gather(1, kept[..., None].expand(-1, -1, VISION_WIDTH))
