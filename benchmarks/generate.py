"""Captions a second with all visual tokens and with the kept ones: the saving in the stage that costs most.

    python -m benchmarks.generate [--device cpu] [--width 768 --layers 12] [--batch 8] [--new-tokens 32] [--runs 5]
    python -m benchmarks.generate --device cuda --width 4096 --layers 32 --batch 64     # LLaVA-1.5-7B's layers

Weights are random: speed does not depend on them. Both settings alternate in one process. Prints medians, the first
batch of each setting, which also sets up libraries, and on a GPU the peak memory. The last line is JSON with the ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.random_model import make_checkpoint
from otprune import num_kept
from otprune.models import Decoder, load_decoder


def time_batch(decoder: Decoder, num_tokens: int, batch: int, new_tokens: int, device: str) -> float:
    """Seconds to caption `batch` images of `num_tokens` visual tokens each, with `new_tokens` in every caption."""
    decoder.end_tokens = []  # no caption ends early, so both settings decode the same number of tokens
    width = decoder.model.config.hidden_size
    visual = [torch.randn(num_tokens, width, device=device, dtype=decoder.model.dtype) * 0.02 for _ in range(batch)]
    prompts = [decoder.encode_prompt("describe the image .")] * batch
    synchronize(device)
    start = time.perf_counter()
    decoder.generate(visual, prompts, max_new_tokens=new_tokens)
    synchronize(device)
    return time.perf_counter() - start


def peak_gib(decoder: Decoder, count: int, options: argparse.Namespace) -> float:
    """Peak GPU memory of one batch, in GiB, weights included."""
    torch.cuda.reset_peak_memory_stats()
    time_batch(decoder, count, options.batch, options.new_tokens, options.device)
    return torch.cuda.max_memory_allocated() / 2**30


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timing_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of one stage share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--retention", type=float, default=0.098)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; an actor of the job has one")
    return parser


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), width=options.width, layers=options.layers, dtype=dtype)
        decoder = load_decoder(Path(folder), dtype=dtype, device=options.device)
    kept = num_kept(options.retention, 576)
    seconds: dict[int, list[float]] = {576: [], kept: []}
    for _ in range(options.runs + 1):
        for count, times in seconds.items():
            times.append(time_batch(decoder, count, options.batch, options.new_tokens, options.device))
    first = {count: times.pop(0) for count, times in seconds.items()}
    memory: dict[int, float] = {}
    if options.device != "cpu":
        memory = {count: peak_gib(decoder, count, options) for count in seconds}
    rates = {count: options.batch / statistics.median(times) for count, times in seconds.items()}
    for count, rate in rates.items():
        peak = f", {memory[count]:.1f} GiB at most" if memory else ""
        cold = f"first {first[count]:.2f} s, then {options.batch / rate:.2f} s a batch"
        print(f"{count:>4} visual tokens: {rate:8.2f} captions/s ({cold}){peak}")
    ratio = statistics.median(full / pruned for full, pruned in zip(seconds[576], seconds[kept], strict=True))
    shape = {k: getattr(options, k) for k in ("device", "width", "layers", "batch", "new_tokens")}
    result = {
        "captions_per_second": {count: round(rate, 3) for count, rate in rates.items()},
        "seconds_first_batch": {count: round(elapsed, 3) for count, elapsed in first.items()},
    }
    print(json.dumps(shape | result | {"ratio": round(ratio, 2), "peak_gib": memory}))


if __name__ == "__main__":
    main()
