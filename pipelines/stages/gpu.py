"""The device of an actor: its dtype, its limit of memory, and the end of an actor with a broken CUDA context."""

import os
from dataclasses import dataclass

import torch

from pipelines.text import clean

CONTEXT_BYTES = 0.6e9  # GPU memory of a process's CUDA context, which torch does not count


@dataclass(frozen=True, slots=True)
class Place:
    """The device and the precision in which an actor computes."""

    device: str = "cpu"  # a name of torch: cpu, cuda, or cuda:1 for one of several
    dtype: str = "auto"  # value of `model.dtype`
    gpu_share: float = 1.0  # GPUs of this actor; below 1 the actor shares a GPU with other actors

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype, self.device)


def exit_if_cuda_is_broken(error: Exception) -> None:
    """Ends the process if the error leaves the CUDA context unusable, so that Ray starts a fresh actor."""
    text = str(error)
    # Out of memory is an error of CUDA too, but the context stays usable.
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" not in text:
        return
    print(f"the CUDA context is broken, the actor restarts: {clean(text)}", flush=True)
    # An orderly exit would tell Ray that the actor is meant to stay dead; `os._exit` looks like a crash.
    os._exit(1)


def limit_memory(device: str, share: float) -> None:
    """Limits torch to this process's `share` of a GPU. The CUDA context counts as part of the share."""
    if device == "cpu" or not 0 < share < 1:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.05, share - CONTEXT_BYTES / total), device)


def torch_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of a value of `model.dtype`. `auto` means bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
