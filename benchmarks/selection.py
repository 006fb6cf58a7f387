"""Selection: milliseconds an image, beside a reference loop written from the description of the released code.

    python benchmarks/selection.py [--device cpu|cuda] [--quick]
    python benchmarks/selection.py --long [--tokens 4096,15301] [--widths 2048,3584]

Takes about three minutes on two CPU cores, half a minute with --quick. Every ratio comes from one run: the reference
and `select_tokens` take turns on the same images, and the medians of the turns are compared. `ratio` compares wall
time, `cpu_ratio` compares processor time, which a busy machine disturbs less. The last line is JSON, one entry per
shape and batch.

The reference loop takes one image, as the released code does, so its time an image is the same at every batch size. The
loop is in its best conditions here: float32 throughout, and no environment variables, windows or model around it.

On CUDA, the features are float16 and batch 64 is added. Two lower bounds are added as well: bytes (reading the features
once at the memory rate measured here) and FLOPs (one Gram matrix at the TF32 rate measured here).

`--long` takes one image of each number of tokens, up to 15,301, at two retentions, without the reference: the least
milliseconds, wall and processor time, and the most memory above the image's own features (MiB, from Linux) of each
selector. Quarter of an hour on one core.
"""

import argparse
import ctypes
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from otprune import num_kept, select_tokens

SHAPES = [(576, 4096, 56), (576, 1024, 56), (256, 256, 25), (2880, 4096, 282)]  # N, D, k
BATCHES = {"cpu": (1, 16), "cuda": (1, 16, 64)}
OTHERS = ("logdet_linear", "divprune")
LONG_TOKENS = (256, 576, 1024, 2880, 4096, 8192, 15301)
LONG_WIDTHS = (2048, 3584)
LONG_RETENTIONS = (0.098, 0.25)


def reference_otprune(features_ND: Tensor, k: int, gamma: float = 0.01) -> list[int]:
    """The released method as described: it builds the whole N x N kernel and copies every pick to the host.

    features_ND: float [N, D]. Returns the sorted indices of the picks.
    """
    tokens_ND = features_ND.float()
    tokens_ND = tokens_ND / tokens_ND.norm(dim=-2, keepdim=True)
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


class Times(NamedTuple):
    """Median milliseconds of one call: wall time, and processor time of this process."""

    wall: float
    cpu: float

    def of_one(self, num_images: int) -> "Times":
        return Times(self.wall / num_images, self.cpu / num_images)


def take_turns(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, Times]:
    """Times the calls in turns, so that other work on the machine slows all of them alike.

    Each call gets at least 3 turns, and turns go on for `seconds`.
    """
    turns: dict[str, list[Times]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm up: threads, allocator, kernels to compile
    end = time.perf_counter() + seconds
    while min(len(times) for times in turns.values()) < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize(device)
            turns[name].append(Times((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    return {name: Times(*(statistics.median(t) for t in zip(*times, strict=True))) for name, times in turns.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def image_tokens(batch: int, num_tokens: int, width: int, device: str) -> Tensor:
    """Tokens [batch, N, D] that resemble real ones: a shared mean, a falling spectrum and a tail of large norms."""
    generator = torch.Generator().manual_seed(0)
    rank = min(256, width)
    falling = torch.arange(1, rank + 1) ** -0.5
    mixing = torch.randn(rank, width, generator=generator)
    tokens = torch.randn(batch, num_tokens, rank, generator=generator) * falling @ mixing
    norms = torch.exp(0.3 * torch.randn(batch, num_tokens, 1, generator=generator))
    tokens = (tokens + 0.1 * torch.randn(batch, num_tokens, width, generator=generator) + 0.5) * norms
    return tokens.to(device, torch.float16 if device == "cuda" else torch.float32)


@functools.cache
def gpu_rates() -> tuple[float, float]:
    """Measured rates of this GPU: (bytes a millisecond, TF32 FLOPs a millisecond)."""
    block = torch.empty(2**28, device="cuda")
    square = torch.randn(8192, 8192, device="cuda")
    torch.set_float32_matmul_precision("high")
    rate = take_turns({"copy": lambda: block.add_(1), "product": lambda: square @ square}, "cuda", 2)
    torch.set_float32_matmul_precision("highest")
    return 2 * block.numel() * 4 / rate["copy"].wall, 2 * 8192**3 / rate["product"].wall


def measure(num_tokens: int, width: int, k: int, batch: int, device: str, seconds: float) -> dict[str, float]:
    features = image_tokens(batch, num_tokens, width, device)
    # The reference takes as many images a turn as `select_tokens`, so that a burst of other work hits both alike.
    # Large images, which take the reference seconds, come one a turn.
    images, num_reference = itertools.cycle(features), batch if num_tokens < 1000 else 1
    calls: dict[str, Callable[[], object]] = {
        "reference": lambda: [reference_otprune(image, k) for image in itertools.islice(images, num_reference)],
        "ours": lambda: select_tokens(features, k),
    }
    calls |= {name: lambda name=name: select_tokens(features, k, method=name) for name in OTHERS}
    times = take_turns(calls, device, seconds)
    result: dict[str, float] = {"N": num_tokens, "D": width, "k": k, "B": batch}
    ours, reference = (times[name].of_one(images) for name, images in (("ours", batch), ("reference", num_reference)))
    result["ours_ms"], result["reference_ms"] = round(ours.wall, 4), round(reference.wall, 4)
    result["ratio"], result["cpu_ratio"] = round(reference.wall / ours.wall, 2), round(reference.cpu / ours.cpu, 2)
    result |= {f"{name}_ms": round(times[name].of_one(batch).wall, 4) for name in OTHERS}
    if device == "cuda":
        bytes_per_ms, flops_per_ms = gpu_rates()
        result["floor_bytes_ms"] = round(num_tokens * width * features.element_size() / bytes_per_ms, 5)
        result["floor_flops_ms"] = round(2 * num_tokens**2 * width / flops_per_ms, 5)
    return result


def measure_long(num_tokens: int, width: int, retention: float) -> list[dict[str, float | str]]:
    """Milliseconds and memory of each selector on one image: the best of as many turns as a second holds, at least 1.

    Processor time is that of the turn with the least.
    """
    features, k = image_tokens(1, num_tokens, width, "cpu"), num_kept(retention, num_tokens)
    results: list[dict[str, float | str]] = []
    for method in ("otprune", *OTHERS):
        select_tokens(features[:, :64], 8, method=method)  # warm up
        turns: list[Times] = []
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free but resident would hide some of what is allocated next
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from what is resident now
        before, end = _resident("VmRSS"), time.perf_counter() + 1
        while not turns or (len(turns) < 20 and time.perf_counter() < end):
            wall, cpu = time.perf_counter(), time.process_time()
            select_tokens(features, k, method=method)
            turns.append(Times((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
        best = Times(*map(min, zip(*turns, strict=True)))
        shape = {"N": num_tokens, "D": width, "k": k, "method": method}
        peak = _resident("VmHWM") - before
        results.append(shape | {"ms": round(best.wall, 1), "cpu_ms": round(best.cpu, 1), "peak_mib": round(peak)})
    return results


def _resident(name: str) -> float:
    """Resident memory of this process in MiB: VmRSS now, VmHWM its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Milliseconds an image to select tokens, ours beside a reference loop."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer turns, and 2,880 tokens at batch 1 only")
    parser.add_argument("--long", action="store_true", help="one image of each length, time and memory, on the CPU")
    parser.add_argument("--tokens", default=",".join(map(str, LONG_TOKENS)), help="with --long: numbers of tokens")
    parser.add_argument("--widths", default=",".join(map(str, LONG_WIDTHS)), help="with --long: feature widths")
    arguments = parser.parse_args()
    if arguments.long:
        print_long(*([int(number) for number in text.split(",")] for text in (arguments.tokens, arguments.widths)))
        return
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


def print_long(lengths: list[int], widths: list[int]) -> None:
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"cpu: {threads} threads, torch {torch.__version__}, load {load:.1f}; one image")
    results = []
    for shape in itertools.product(lengths, widths, LONG_RETENTIONS):
        results += measure_long(*shape)
        for result in results[-len(OTHERS) - 1 :]:
            print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
