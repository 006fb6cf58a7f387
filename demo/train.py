"""Train the demo model from scratch with one command. If it is killed, the same command resumes.

    python -m demo.train --out runs/demo_model [--seed 0] [--threads 1] [--device auto]
    python -m demo.train --out /tmp/quick --quick        # seconds; tests the code, learns nothing

Three stages: "vision" (`demo.train_vision`), "words" and "answers" (`demo.train_language`). Writes into the folder:

    train.jsonl     one line per logged step        vision.pt words.pt answers.pt   state of the stages
    features/       the frozen tower's features     checkpoint/   the model in the Hugging Face layout, float16
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
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demo.evaluate import evaluate
from demo.model import build_model, build_tokenizer, export
from demo.train_language import ask, cache_features, language_loss, load_batch
from demo.train_vision import VisionHeads, initialise_tower, vision_loss, word_groups
from demo.training import Stage, json_lines, run_stage
from demo.vision_data import whole_batch, window_batch
from demo.world import GRID, scene_at

Log = Callable[[dict], None]
SCENES_PER_SEED = 1 << 24  # scene numbers of each seed: the first half for "vision", the second for the other stages


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages with their lengths, and the amount of data for each."""

    vision: Stage
    words: Stage
    answers: Stage
    vision_scenes: int = 8  # per step
    whole_from: float = 0.85  # share of the vision steps after which whole images replace windows
    language_scenes: int = 12  # per step
    cached_scenes: int = 4096
    words_extra: tuple[str, ...] = ("exist", "attr", "rel", "mc", "letter")
    answers_extra: tuple[str, ...] = ("exist", "count", "rel", "rel", "mc", "mc")
    whole_only_from: float = 0.85  # share of the answers steps after which all visual tokens are kept
    evaluation_scenes: int = 320


FULL = Plan(
    vision=Stage(name="vision", steps=3200, lr=1.5e-3, warmup=80),
    words=Stage(name="words", steps=1500, lr=1.5e-3),
    answers=Stage(name="answers", steps=900, lr=1e-3),
)
QUICK = Plan(
    vision=Stage(name="vision", steps=4, lr=1e-3, log_every=1, save_every=2),
    words=Stage(name="words", steps=3, lr=1e-3, log_every=1, save_every=2),
    answers=Stage(name="answers", steps=3, lr=1e-3, log_every=1, save_every=2),
    vision_scenes=1,
    language_scenes=2,
    cached_scenes=8,
    evaluation_scenes=4,
)


def train(out: Path, plan: Plan = FULL, *, seed: int = 0, device: torch.device, log: Log) -> dict[str, float]:
    """Run or resume all stages, export the checkpoint and evaluate it; returns the metrics.

    Raises:
        ValueError: if the seed is outside [0, 256), or the folder was started with another plan or seed.
    """
    _claim(out, plan, seed)
    tokenizer = build_tokenizer()
    run = _Run(_place(build_model(tokenizer, seed), device), tokenizer, plan, seed, out, log)
    _train_vision(run)
    run.model.model.vision_tower.requires_grad_(False)
    cached = cache_features(run.model, run.first_language_scene, plan.cached_scenes, out / "features")
    _train_language(run, plan.words, plan.words_extra, cached)
    _train_language(run, plan.answers, plan.answers_extra, cached)
    export(run.model, tokenizer, out / "checkpoint")

    scenes = [scene_at("validation", index) for index in range(plan.evaluation_scenes)]
    shipped = LlavaForConditionalGeneration.from_pretrained(out / "checkpoint", dtype=torch.float32)
    metrics = evaluate(_place(shipped, device), tokenizer, scenes)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    log({"stage": "done", **metrics})
    return metrics


@dataclass(frozen=True)
class _Run:
    """The state that all stages share."""

    model: LlavaForConditionalGeneration
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
    """Write plan and seed to the folder, or check that the folder was started with the same plan and seed."""
    if not 0 <= seed < 256:
        raise ValueError(f"seed must be in [0, 256), got {seed}")
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({"seed": seed, **asdict(plan)}))
    path = out / "plan.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"out must be a new folder or one started with the same plan and seed, got {out}")
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _place(model: LlavaForConditionalGeneration, device: torch.device) -> LlavaForConditionalGeneration:
    return model.to(device)  # pyright: ignore[reportArgumentType] transformers' wrapper hides torch's signature


def _train_vision(run: _Run) -> None:
    model, plan, stage = run.model, run.plan, run.plan.vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed + 1)
        heads = VisionHeads().to(model.device)
    if not (run.out / f"{stage.name}.pt").is_file():
        initialise_tower(model, run.first_vision_scene)
    words = word_groups(run.tokenizer, model.device)
    trained = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "words": model.model.language_model.embed_tokens,
        "heads": heads,
    }

    def loss_at(step: int):
        whole = step >= plan.whole_from * stage.steps
        first = run.first_vision_scene + step * plan.vision_scenes
        scenes = [scene_at("train", first + index) for index in range(plan.vision_scenes)]
        batch = whole_batch(scenes) if whole else window_batch(scenes, run.draws(stage, step))
        return vision_loss(model, heads, words, batch, whole=whole)

    run_stage(stage, nn.ModuleDict(trained), loss_at, run.out, run.log)


def _train_language(run: _Run, stage: Stage, extra: tuple[str, ...], cached: tuple[np.ndarray, np.ndarray]) -> None:
    model, plan = run.model, run.plan
    trained = {"projector": model.model.multi_modal_projector, "decoder": model.model.language_model}

    def loss_at(step: int):
        rng = run.draws(stage, step)
        keep = _num_visual(plan, stage, step, rng)
        index = rng.choice(plan.cached_scenes, plan.language_scenes, replace=False)
        asking = random.Random(int(rng.integers(1 << 62)))
        scenes = [scene_at("train", run.first_language_scene + int(number)) for number in index]
        features = load_batch(*cached, index, keep, rng).to(model.device)
        return language_loss(model, run.tokenizer, features, [ask(scene, asking, extra) for scene in scenes])

    run_stage(stage, nn.ModuleDict(trained), loss_at, run.out, run.log)


def _num_visual(plan: Plan, stage: Stage, step: int, rng: np.random.Generator) -> int:
    """The number of visual tokens that the step keeps of each image."""
    if stage is plan.words:
        return GRID**2 // 4
    if step >= plan.whole_only_from * stage.steps:
        return GRID**2
    return int(rng.choice([GRID**2, GRID**2, GRID**2 // 2, GRID**2 // 4]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description="Train the demo model from scratch.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
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
