"""Stages "words" and "answers": the language model learns to caption and to answer; tower and merger are frozen.

The visual tokens of the training scenes are computed once and stored on disk. Each step takes pictures of one size and
packs a long caption, a short one and a dozen questions behind every one of them (`demo.gallery.packing`).

* "words": half of the visual tokens, namely all cells of things and random background, so a step costs less
* "answers": all of them (half of the steps), a half or a quarter selected in this way; at the end all

The language model thus learns from pictures without some of their background, but never without a thing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from demo.gallery import labels as lab
from demo.gallery.language import LONG_PROMPT, SHORT_PROMPT, TASKS, long_caption, question, short_caption
from demo.gallery.model import encode
from demo.gallery.packing import Asked, answer_logits, pack, prefix_ids
from demo.gallery.render import render
from demo.gallery.world import SIZES, Scene, scene_at
from demo.training import autocast


def ask(scene: Scene, rng: random.Random, extra: Sequence[str] = ()) -> list[Asked]:
    """Both captions and a question of each task, also of those in `extra`, where the scene allows one."""
    asked = [Asked("long", LONG_PROMPT, long_caption(scene)), Asked("short", SHORT_PROMPT, short_caption(scene))]
    pairs = [(task, question(scene, task, rng)) for task in (*TASKS, *extra)]
    return asked + [Asked(task, *pair) for task, pair in pairs if pair]


@dataclass(frozen=True)
class Cached:
    """Visual tokens of the training scenes of one size."""

    first: int  # number of the first scene
    size: tuple[int, int]  # columns and rows
    tokens: np.ndarray  # bfloat16 bits as int16 [count, N, D]
    occupied: np.ndarray  # whether a cell shows a thing, bool [count, N]


def cache_tokens(model: Qwen2_5_VLForConditionalGeneration, first: int, count: int, folder: Path) -> list[Cached]:
    """The visual tokens of `count` scenes of each size. A killed run loses at most the file of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    cached = []
    for number, size in enumerate(SIZES):
        start, path = first + number * count, folder / f"tokens-{size[0]}x{size[1]}.npz"
        if not path.is_file():
            tokens, occupied = _encode_scenes(model, [scene_at("train", start + i, size) for i in range(count)])
            np.savez(path.with_suffix(".tmp.npz"), tokens=tokens, occupied=occupied)
            path.with_suffix(".tmp.npz").replace(path)
        with np.load(path) as stored:
            cached.append(Cached(start, size, stored["tokens"], stored["occupied"]))
    return cached


@torch.no_grad()
def _encode_scenes(model: Qwen2_5_VLForConditionalGeneration, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    tokens, occupied = [], []
    for start in range(0, len(scenes), 8):
        drawings = [render(scene) for scene in scenes[start : start + 8]]
        with autocast(model.device):
            encoded, _ = encode(model, np.stack([drawing.pixels for drawing in drawings]))
        tokens.append(encoded.bfloat16().view(torch.int16).cpu().numpy())
        for scene, drawing in zip(scenes[start : start + 8], drawings, strict=True):
            occupied.append(lab.cell_labels(scene, drawing.alpha)[:, lab.KIND] != lab.NOTHING)
    return np.concatenate(tokens), np.stack(occupied)


def load_batch(cached: Cached, index: np.ndarray, keep: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Visual tokens float32 [B, keep, D] and their cells int64 [B, keep] in raster order: all things, then random."""
    rows = torch.from_numpy(cached.tokens[index]).view(torch.bfloat16).float()
    # Random ranks in [0, 1), lowered by 1 for things: the smallest ranks are all things, then random background.
    order = rng.random(cached.occupied[index].shape) - cached.occupied[index]
    kept = torch.from_numpy(np.sort(np.argsort(order, 1)[:, :keep], 1))
    return rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[-1])), kept


def language_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    tokens_BKD: Tensor,
    kept_BK: Tensor,
    size: tuple[int, int],
    asked: list[list[Asked]],
) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross entropy of all answers, and the share of answer tokens that are right."""
    packed = pack(asked, tokenizer, kept_BK, *size)
    with autocast(tokens_BKD.device):
        logits, is_target = answer_logits(model, prefix_ids(tokenizer), tokens_BKD, packed)
    targets, weights = (part.to(logits.device)[is_target] for part in (packed.targets, packed.weights))
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    right = (logits.argmax(1) == targets).float()
    segment = packed.segment.to(logits.device)[is_target]
    numbers = {"long": right[segment == 1].mean().item(), "answers": right[segment > 2].mean().item()}
    return (losses * weights).sum() / weights.sum(), numbers
