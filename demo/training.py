"""A resumable training stage: AdamW, warm-up and cosine decay, state on disk, a log of JSON lines.

The batch of a step depends on (seed, stage, step) alone. A stage that was killed therefore resumes from its last saved
step, and ends on the same machine with exactly the weights of an uninterrupted run.
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
    """The length and the learning rates of a stage; `final_lr` is a share of `lr`."""

    name: str
    steps: int
    lr: float
    final_lr: float = 0.02
    warmup: int = 100
    log_every: int = 50
    save_every: int = 100


LossAt = Callable[[int], tuple[Tensor, dict[str, float]]]


def run_stage(stage: Stage, trained: nn.ModuleDict, loss_at: LossAt, folder: Path, log: Callable[[dict], None]) -> None:
    """Train `trained` in place on `loss_at(step) -> (loss, numbers to log)`. A finished stage only loads its weights.

    `folder/<stage>.pt` holds the state: the step, the weights, and until the stage ends the optimizer's moments.
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
    """Write to a temporary file and rename it, so that a reader never sees half a file."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def json_lines(path: Path) -> Callable[[dict], None]:
    """A function that logs an entry: it prints the entry and appends it to the file as a JSON line."""

    def log(entry: dict) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in entry.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return log


def autocast(device: torch.device) -> AbstractContextManager:
    """Compute in bfloat16 with float32 weights, precise enough here, where the device has bfloat16 arithmetic."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
