"""Train the demo model's M3 variant: projector and language model learn to read all pooled grids (arXiv 2405.17430).

    python -m demo.train_m3 --out runs/demo_m3 [--steps 600]      # the same command resumes
    python jobs/caption_corpus.py model.path=runs/demo_m3/checkpoint --config conf/demo.yaml prune.method=m3

Starts from a trained checkpoint (`--model`) with its vision tower frozen. Without this training, pooling is another
method, whose results are labelled "vanilla".

Departures:
- Each step draws one grid; M3 averages the loss over all of them at every step. The mean over steps is the same.
- Grids are the divisors of 16: 1, 2, 4, 8, 16. M3 has 1, 3, 6, 12 and 24.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demo.model import build_tokenizer, export
from demo.packing import Asked, answer_logits, pack, prefix_ids
from demo.train_language import ask, cache_features, load_batch
from demo.training import Stage, autocast, json_lines, run_stage
from demo.world import GRID, scene_at
from otprune.methods.m3 import m3_grids, m3_pool

SHIPPED = Path(__file__).resolve().parent / "checkpoint"
FIRST_SCENE = 200 << 24  # training scenes of an unused seed: the shipped model never saw them
EXTRA = ("exist", "count", "rel", "mc")


def train_m3(model_folder: Path, out: Path, *, stage: Stage, scenes: int, cached: int, device: torch.device) -> Path:
    """Runs or resumes the stage; returns the folder of the checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = LlavaForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    model = model.to(device)  # pyright: ignore[reportArgumentType] transformers' wrapper hides torch's signature
    model.model.vision_tower.requires_grad_(False)
    features, occupied = cache_features(model, FIRST_SCENE, cached, out / "features")
    trained = {"projector": model.model.multi_modal_projector, "decoder": model.model.language_model}

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([*stage.name.encode(), step])
        grid = int(rng.choice(m3_grids(GRID**2)))
        index = rng.choice(cached, scenes, replace=False)
        asking = random.Random(int(rng.integers(1 << 62)))
        asked = [ask(scene_at("train", FIRST_SCENE + int(number)), asking, EXTRA) for number in index]
        rows = load_batch(features, occupied, index, GRID**2, rng).to(device)
        return pooled_loss(model, tokenizer, rows, asked, grid), {"grid": float(grid)}

    run_stage(stage, nn.ModuleDict(trained), loss_at, out, json_lines(out / "train.jsonl"))
    export(model, tokenizer, out / "checkpoint")
    return out / "checkpoint"


def pooled_loss(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features_BND: Tensor,
    asked: list[list[Asked]],
    grid: int,
) -> Tensor:
    """Weighted cross entropy of all answers, with each image's tokens pooled to grid x grid after the projector."""
    packed = pack(asked, tokenizer, grid**2)
    with autocast(features_BND.device):
        visual = m3_pool(model.model.multi_modal_projector(features_BND), grid)
        logits, is_target = answer_logits(model, prefix_ids(tokenizer), visual, packed)
    targets, weights = (part.to(logits.device)[is_target] for part in (packed.targets, packed.weights))
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_m3", description="Train the demo model's M3 variant.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--scenes", type=int, default=12, help="scenes of one step")
    parser.add_argument("--cached", type=int, default=2048, help="scenes to learn from")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = Stage(name="m3", steps=arguments.steps, lr=7e-4, warmup=min(50, arguments.steps))
    folder = train_m3(
        arguments.model, arguments.out, stage=stage, scenes=arguments.scenes, cached=arguments.cached, device=device
    )
    print(f"checkpoint {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
