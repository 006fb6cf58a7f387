"""The device of an actor: its memory, its dtype, a broken CUDA context."""

import os
from dataclasses import dataclass

import torch

from pipelines.text import clean

CONTEXT_BYTES = 0.6e9  # of a CUDA process, outside torch's account


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor computes, and in which precision."""

    device: str = "cpu"  # cpu | cuda, or as torch names one of several
    dtype: str = "auto"  # of `model.dtype`
    gpu_share: float = 1.0  # GPUs of this actor; below 1 it shares one with other actors

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype, self.device)


def exit_if_cuda_is_broken(error: Exception) -> None:
    """Ends the process after an error that poisons the CUDA context, so that Ray starts a fresh actor.

    `os._exit`, since an orderly exit would tell Ray that the actor is meant to stay dead.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" not in text:
        return
    print(f"the CUDA context is broken, the actor restarts: {clean(text)}", flush=True)
    os._exit(1)


def limit_memory(device: str, share: float) -> None:
    """Keeps torch within this process's share of a GPU that it shares, its CUDA context included."""
    if device == "cpu" or not 0 < share < 1:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.05, share - CONTEXT_BYTES / total), device)


def torch_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
