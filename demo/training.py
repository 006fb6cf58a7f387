"""One resumable training stage: AdamW, warm-up and cosine, state on disk, JSON lines.

The batch of a step is a function of (seed, stage, step) alone, so a stage that is killed and started again goes on from
its last saved step and ends, on the same machine, with the very weights of an unbroken run.
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

_ADAM_BETAS, _WEIGHT_DECAY, _MAX_GRAD_NORM = (0.9, 0.98), 0.05, 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How long and how fast; `final_lr` is a share of `lr`."""

    name: str
    steps: int
    lr: float
    final_lr: float = 0.02
    warmup: int = 100
    log_every: int = 50
    save_every: int = 100


LossAt = Callable[[int], tuple[Tensor, dict[str, float]]]


def run_stage(stage: Stage, trained: nn.ModuleDict, loss_at: LossAt, folder: Path, log: Callable[[dict], None]) -> None:
    """Train `trained` in place on `loss_at(step) -> (loss, numbers to log)`; finished stages only load their weights.

    State lives in `folder/<stage>.pt`: step, weights, and while the stage runs the optimizer's moments.
    """
    path = folder / f"{stage.name}.pt"
    optimizer = _optimizer(trained, stage.lr)
    start = 0
    if path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)
        trained.load_state_dict(state["weights"])
        start = state["step"]
        if start < stage.steps:
            optimizer.load_state_dict(state["optimizer"])
    began = time.perf_counter()
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * _schedule(step, stage)
        optimizer.zero_grad(set_to_none=True)
        loss, numbers = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], _MAX_GRAD_NORM)
        optimizer.step()
        done = step + 1
        if done % stage.log_every == 0 or done == stage.steps:
            seconds = round(time.perf_counter() - began, 1)
            log({"stage": stage.name, "step": done, "seconds": seconds, "loss": loss.item(), **numbers})
        if done == stage.steps:
            save_atomically({"step": done, "weights": trained.state_dict()}, path)
        elif done % stage.save_every == 0:
            state = {"step": done, "weights": trained.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(state, path)


def _optimizer(trained: nn.ModuleDict, lr: float) -> torch.optim.AdamW:
    parameters = [p for p in trained.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=_ADAM_BETAS,
        weight_decay=_WEIGHT_DECAY,
    )


def _schedule(step: int, stage: Stage) -> float:
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / stage.steps)
    return min(1.0, (step + 1) / stage.warmup) * (stage.final_lr + (1 - stage.final_lr) * cosine)


def save_atomically(state: dict, path: Path) -> None:
    """A reader sees the old file or the new one, never half of one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def json_lines(path: Path) -> Callable[[dict], None]:
    """A log that appends to a file and prints."""

    def log(entry: dict) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in entry.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return log


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 products over float32 weights: twice as fast on CPUs that have them, and exact enough here."""
    return torch.autocast(device.type, torch.bfloat16)
