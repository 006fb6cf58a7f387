"""Selection: milliseconds an image, ours beside a loop written from the description of the released code.

    python benchmarks/selection.py [--device cpu|cuda] [--quick]

About two minutes on two CPU cores, 20 s with --quick. Every ratio comes from one run: reference and ours take turns on
the same images and the medians of the turns are compared. The last line is JSON, one entry per shape and batch.

The reference loop takes one image, as the released code does, so its time an image is the same at every batch size. It
is at its best here: float32 throughout and no environment variables, windows or model around it.

On CUDA batch 64 is added, and the two floors: bytes (reading the features once at the memory rate measured here) and
FLOPs (one Gram matrix at the TF32 rate measured here). `--device cuda` on a machine without CUDA is refused.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from otprune import select_tokens

SHAPES = [(576, 4096, 56), (576, 1024, 56), (256, 256, 25), (2880, 4096, 282)]  # N, D, k
BATCHES = {"cpu": (1, 16), "cuda": (1, 16, 64)}
OTHERS = ("logdet_linear", "divprune")


def reference_otprune(features_ND: Tensor, k: int, gamma: float = 0.01) -> list[int]:
    """The released method as described: all of the N x N kernel, and the host asked for every pick."""
    tokens_ND = features_ND / features_ND.norm(dim=-2, keepdim=True)
    similarity_NN = tokens_ND @ tokens_ND.T
    num_tokens = len(tokens_ND)
    kernel_NN = torch.eye(num_tokens, device=tokens_ND.device) + gamma * (similarity_NN @ similarity_NN.T)
    chol_KN = torch.zeros(k, num_tokens, device=tokens_ND.device)
    variance_N = kernel_NN.diagonal().clone()
    picks: list[int] = []
    for step in range(k):
        pick = int(torch.argmax(variance_N).item())
        picks.append(pick)
        column_N = kernel_NN[pick] - chol_KN[:step, pick] @ chol_KN[:step]
        column_N = column_N / torch.sqrt(variance_N[pick])
        chol_KN[step] = column_N
        variance_N = variance_N - column_N**2
    return sorted(set(picks))


def take_turns(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each call; they alternate, so that what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm up: threads, allocator, kernels to compile
    end = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def image_tokens(batch: int, num_tokens: int, width: int, device: str) -> Tensor:
    """Tokens with what real ones have: a shared mean, a falling spectrum, and a tail of large norms."""
    generator = torch.Generator().manual_seed(0)
    rank = min(256, width)
    falling = torch.arange(1, rank + 1) ** -0.5
    mixing = torch.randn(rank, width, generator=generator)
    tokens = torch.randn(batch, num_tokens, rank, generator=generator) * falling @ mixing
    norms = torch.exp(0.3 * torch.randn(batch, num_tokens, 1, generator=generator))
    return ((tokens + 0.1 * torch.randn(batch, num_tokens, width, generator=generator) + 0.5) * norms).to(device)


def floors_ms(num_tokens: int, width: int) -> tuple[float, float]:
    """Milliseconds an image that reading the features and forming one Gram matrix take at this GPU's measured rates."""
    block = torch.empty(2**28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda")
    torch.set_float32_matmul_precision("high")
    rate = take_turns({"copy": lambda: block.add_(1), "product": lambda: square @ square}, "cuda", 2)
    torch.set_float32_matmul_precision("highest")
    bytes_per_ms = 2 * block.numel() * 4 / rate["copy"]
    flops_per_ms = 2 * 8192**3 / rate["product"]
    return num_tokens * width * 4 / bytes_per_ms, 2 * num_tokens**2 * width / flops_per_ms


def measure(num_tokens: int, width: int, k: int, batch: int, device: str, seconds: float) -> dict[str, float]:
    features = image_tokens(batch, num_tokens, width, device)
    images = itertools.cycle(features)
    calls: dict[str, Callable[[], object]] = {
        "reference": lambda: reference_otprune(next(images), k),
        "ours": lambda: select_tokens(features, k),
    }
    calls |= {name: lambda name=name: select_tokens(features, k, method=name) for name in OTHERS}
    times = take_turns(calls, device, seconds)
    result: dict[str, float] = {"N": num_tokens, "D": width, "k": k, "B": batch}
    result["ours_ms"] = round(times["ours"] / batch, 4)
    result["reference_ms"] = round(times["reference"], 4)
    result["ratio"] = round(times["reference"] * batch / times["ours"], 2)
    result |= {f"{name}_ms": round(times[name] / batch, 4) for name in OTHERS}
    if device == "cuda":
        result["floor_bytes_ms"], result["floor_flops_ms"] = (round(t, 5) for t in floors_ms(num_tokens, width))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Milliseconds an image to select tokens, ours beside a reference loop."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer turns, and 2,880 tokens at batch 1 only")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu on this machine, got cuda")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device}: {where}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}; milliseconds an image")

    results = []
    for num_tokens, width, k in SHAPES:
        for batch in BATCHES[device]:
            if arguments.quick and num_tokens * batch > 16_000:
                continue
            seconds = (1 if arguments.quick else 8) * (1 if num_tokens < 1000 else 2)
            results.append(measure(num_tokens, width, k, batch, device, seconds))
            print("  ".join(f"{name} {value:g}" for name, value in results[-1].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
