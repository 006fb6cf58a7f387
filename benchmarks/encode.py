"""Images a second through vision tower and projector, and the time that selecting tokens adds.

    python -m benchmarks.encode [--vision-width 384 --vision-layers 12] [--width 768] [--batch 8] [--runs 5]
    python -m benchmarks.encode --device cuda --vision-width 1024 --vision-layers 24 --width 4096 --batch 64

The second line has LLaVA-1.5-7B's shapes.

Random weights, 336-pixel images, 576 visual tokens. In one process, every method alternates with the unpruned pass. On
a GPU, two kinds of batches alternate as well: batches uploaded ahead of their turn (`stages/upload.py`), and batches
uploaded at their turn. Prints medians. The last line is JSON: seconds an image, and the share of the encode stage that
each method takes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.generate import synchronize, timing_parser
from benchmarks.random_model import make_checkpoint
from otprune import num_kept, select_tokens
from otprune.models import llava_encoder, read_checkpoint
from pipelines.stages.batches import run_batched
from pipelines.stages.upload import CudaCopy, Uploader

METHODS = ("none", "otprune", "logdet_linear", "divprune", "random")
UNIT = 8  # batches in the unit whose upload is measured


def main() -> None:
    parser = timing_parser(__doc__)
    parser.add_argument("--vision-width", type=int, default=384)
    parser.add_argument("--vision-layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        shape = {"vision_width": options.vision_width, "vision_layers": options.vision_layers, "width": options.width}
        make_checkpoint(Path(folder), **shape, layers=1, dtype=dtype)
        encoder = llava_encoder.load(read_checkpoint(folder), dtype=dtype, device=options.device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (options.batch, 336, 336, 3), dtype=torch.uint8, generator=generator)
    k = num_kept(options.retention, encoder.num_tokens)

    def encode(method: str, pictures: torch.Tensor = pixels) -> None:
        features = encoder(pictures)
        if method != "none":
            keep = select_tokens(features, k, method=method)
            features = features.gather(1, keep[..., None].expand(-1, -1, features.shape[2]))
        features.cpu()

    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for run in range(options.runs + 1):  # the first run warms up
        for method in METHODS:
            synchronize(options.device)
            start = time.perf_counter()
            encode(method)
            if run:
                seconds[method].append((time.perf_counter() - start) / options.batch)
    if options.device != "cpu":
        unit = pixels.repeat(UNIT, 1, 1, 1)
        seconds |= time_uploads(unit, lambda pictures: encode("otprune", pictures), options)
    medians = {method: statistics.median(times) for method, times in seconds.items()}
    shares = {method: max(0.0, 1 - medians["none"] / median) for method, median in medians.items()}
    for method, median in medians.items():
        print(
            f"{method:<28} {1 / median:8.2f} images/s, {1e3 * median:8.2f} ms an image, selection {shares[method]:.1%}"
        )
    result = {"seconds_per_image": medians, "selection_share": shares}
    if options.device != "cpu":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(shape | {"device": options.device, "batch": options.batch, "kept": k} | result))


def time_uploads(
    unit: torch.Tensor, encode: Callable[[torch.Tensor], None], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds an image to encode a unit whose batches are uploaded at their turn, and ahead of it; one value a run."""
    seconds: dict[str, list[float]] = {"otprune, unit": [], "otprune, unit uploaded ahead": []}
    copy = CudaCopy(options.device)
    for run in range(options.runs + 1):  # the first run warms up
        for name, times in seconds.items():
            synchronize(options.device)
            start = time.perf_counter()
            with Uploader(list(unit.flatten(1)), copy) as upload:
                ahead = upload.ahead if name.endswith("ahead") else lambda indices: None
                failed = run_batched(
                    list(range(len(unit))),
                    options.batch,
                    lambda indices, up=upload: encode(torch.stack(up(indices)).view(-1, *unit.shape[1:])),
                    ahead,
                )
                assert not failed, failed
            if run:
                times.append((time.perf_counter() - start) / len(unit))
    return seconds


if __name__ == "__main__":
    main()
