"""Train the gallery's model from scratch with one command. If it is killed, the same command resumes.

    python -m demo.gallery.train --out runs/gallery_model [--seed 0] [--threads 2] [--device auto]
    python -m demo.gallery.train --out /tmp/quick --quick        # seconds; tests the code, learns nothing

Three stages: "vision" (`demo.gallery.train_vision`), "words" and "answers" (`demo.gallery.train_language`). Writes into
the folder:

    train.jsonl     one line per logged step        vision.pt words.pt answers.pt   state of the stages
    tokens/         the frozen tower's tokens       checkpoint/   the model in the Hugging Face layout, float16
    metrics.json    exact match of each task on held-out scenes; written last
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from demo.gallery.evaluate import evaluate
from demo.gallery.labels import MASK_SIDE
from demo.gallery.model import VISION_WIDTH, build_model, build_tokenizer, export
from demo.gallery.train_language import Cached, ask, cache_tokens, language_loss, load_batch
from demo.gallery.train_vision import draw_batch, initialise_tower, vision_loss, word_groups
from demo.gallery.world import SIZES, scene_at
from demo.training import Stage, json_lines, run_stage

Log = Callable[[dict], None]
SCENES_PER_SEED = 1 << 24  # scene numbers of each seed: the first half for "vision", the second for the other stages
SMALL_SIZES = [(4, 4), (5, 4), (4, 5), (5, 5), (6, 5)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages with their lengths, and the amount of data for each."""

    vision: Stage
    words: Stage
    answers: Stage
    vision_cells: int = 400  # per step
    every_size_from: float = 0.8  # share of the vision steps after which pictures of all sizes replace small ones
    language_scenes: int = 8  # per step
    cached_scenes: int = 320  # of each size
    extra: tuple[str, ...] = ("exist", "attr", "where", "count", "rel", "mc")
    whole_only_from: float = 0.85  # share of the answers steps after which all visual tokens are kept
    evaluation_scenes: int = 320


FULL = Plan(
    vision=Stage(name="vision", steps=1600, lr=1.5e-3, warmup=80),
    words=Stage(name="words", steps=700, lr=1.5e-3),
    answers=Stage(name="answers", steps=350, lr=8e-4),
)
QUICK = Plan(
    vision=Stage(name="vision", steps=4, lr=1e-3, log_every=1, save_every=2),
    words=Stage(name="words", steps=3, lr=1e-3, log_every=1, save_every=2),
    answers=Stage(name="answers", steps=3, lr=1e-3, log_every=1, save_every=2),
    vision_cells=40,
    language_scenes=2,
    cached_scenes=2,
    evaluation_scenes=4,
)


def train(out: Path, plan: Plan = FULL, *, seed: int = 0, device: torch.device, log: Log) -> dict[str, float]:
    """Runs or resumes all stages, exports the checkpoint and evaluates it; returns the metrics.

    Raises:
        ValueError: if the seed is outside [0, 256), or the folder was started with another plan or seed.
    """
    _claim(out, plan, seed)
    tokenizer = build_tokenizer()
    run = _Run(_place(build_model(tokenizer, seed), device), tokenizer, plan, seed, out, log)
    _train_vision(run)
    run.model.model.visual.requires_grad_(False)
    cached = cache_tokens(run.model, run.first_language_scene, plan.cached_scenes, out / "tokens")
    _train_language(run, plan.words, cached)
    _train_language(run, plan.answers, cached)
    export(run.model, tokenizer, out / "checkpoint")

    scenes = [scene_at("validation", index) for index in range(plan.evaluation_scenes)]
    shipped = Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "checkpoint", dtype=torch.float32)
    metrics = evaluate(_place(shipped, device), tokenizer, scenes)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    log({"stage": "done", **metrics})
    return metrics


@dataclass(frozen=True)
class _Run:
    """The state that all stages share."""

    model: Qwen2_5_VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    seed: int
    out: Path
    log: Log

    @property
    def first_vision_scene(self) -> int:
        return self.seed * SCENES_PER_SEED

    @property
    def first_language_scene(self) -> int:
        return self.first_vision_scene + SCENES_PER_SEED // 2

    def draws(self, stage: Stage, step: int) -> np.random.Generator:
        """The random generator of a step. It depends on seed, stage and step alone, so a resumed run draws the same."""
        return np.random.default_rng([self.seed, *stage.name.encode(), step])


def _claim(out: Path, plan: Plan, seed: int) -> None:
    """Writes plan and seed to the folder, or checks that the folder was started with the same plan and seed."""
    if not 0 <= seed < 256:
        raise ValueError(f"seed must be in [0, 256), got {seed}")
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({"seed": seed, **asdict(plan)}))
    path = out / "plan.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"out must be a new folder or one started with the same plan and seed, got {out}")
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _place(model: Qwen2_5_VLForConditionalGeneration, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    return model.to(device)  # pyright: ignore[reportArgumentType] transformers' wrapper hides torch's signature


def _train_vision(run: _Run) -> None:
    model, plan, stage = run.model, run.plan, run.plan.vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed + 1)
        mask_head = nn.Linear(VISION_WIDTH, MASK_SIDE**2).to(model.device)
    if not (run.out / f"{stage.name}.pt").is_file():
        initialise_tower(model, run.first_vision_scene)
    words = word_groups(run.tokenizer, model.device)
    trained = {"tower": model.model.visual, "words": model.model.language_model.embed_tokens, "masks": mask_head}

    def loss_at(step: int):
        sizes = SIZES if step >= plan.every_size_from * stage.steps else SMALL_SIZES
        size = sizes[int(run.draws(stage, step).integers(len(sizes)))]
        count = max(1, plan.vision_cells // (size[0] * size[1]))
        first = run.first_vision_scene + step * plan.vision_cells
        scenes = [scene_at("train", first + index, size) for index in range(count)]
        return vision_loss(model, mask_head, words, draw_batch(scenes))

    run_stage(stage, nn.ModuleDict(trained), loss_at, run.out, run.log)


def _train_language(run: _Run, stage: Stage, cached: list[Cached]) -> None:
    model, plan = run.model, run.plan

    def loss_at(step: int):
        rng = run.draws(stage, step)
        chosen = cached[int(rng.integers(len(cached)))]
        index = rng.choice(plan.cached_scenes, plan.language_scenes, replace=False)
        asking = random.Random(int(rng.integers(1 << 62)))
        scenes = [scene_at("train", chosen.first + int(number), chosen.size) for number in index]
        tokens, kept = load_batch(chosen, index, _num_kept(plan, stage, step, rng, chosen), rng)
        asked = [ask(scene, asking, plan.extra) for scene in scenes]
        return language_loss(model, run.tokenizer, tokens.to(model.device), kept, chosen.size, asked)

    run_stage(stage, nn.ModuleDict({"decoder": model.model.language_model}), loss_at, run.out, run.log)


def _num_kept(plan: Plan, stage: Stage, step: int, rng: np.random.Generator, cached: Cached) -> int:
    """The number of visual tokens that the step keeps of each picture; never fewer than the things have."""
    whole = cached.size[0] * cached.size[1]
    share = 2 if stage is plan.words else int(rng.choice([1, 1, 2, 4]))
    if stage is plan.answers and step >= plan.whole_only_from * stage.steps:
        return whole
    return max(whole // share, int(cached.occupied.sum(1).max()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.gallery.train", description="Train the gallery's model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if arguments.device == "auto" else arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = json_lines(arguments.out / "train.jsonl")
    try:
        train(arguments.out, QUICK if arguments.quick else FULL, seed=arguments.seed, device=device, log=log)
    except ValueError as problem:
        parser.error(str(problem))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
