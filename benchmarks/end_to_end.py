"""The whole job with all visual tokens and with the kept ones: the saving of pruning, overheads included.

    python -m benchmarks.end_to_end [--rows 64] [--width 768 --layers 12] [--runs 2]

Captions a generated corpus on one Ray, with a random model of LLaVA's proportions in which decoding dominates. The two
settings alternate. Rates count from the first finished unit, so they exclude start-up. Prints images/s and the seconds
of each stage. The last line is JSON with the ratio.
"""

import argparse
import json
import logging
import shutil
import statistics
from pathlib import Path

import ray

from benchmarks.random_model import make_checkpoint
from benchmarks.scale import REPOSITORY, make_corpus
from pipelines.config.load import load_config
from pipelines.report.write import report_captions
from pipelines.run.job import prepare
from pipelines.run.run import run_job


def caption(settings: dict[str, object]) -> dict[str, float]:
    """The metrics of one run of the job into an empty output."""
    shutil.rmtree(str(settings["output.path"]), ignore_errors=True)
    outcome = run_job(
        prepare(load_config([f"{key}={value}" for key, value in settings.items()])), conclude=report_captions
    )
    if outcome.code:
        raise SystemExit(outcome.message)
    return outcome.metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--unit", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vision-width", type=int, default=384)
    parser.add_argument("--vision-layers", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--retention", type=float, default=0.098)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".cache" / "end_to_end")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    names = ("width", "layers", "vision_width", "vision_layers")
    shape = {name: getattr(options, name) for name in names}
    model = make_checkpoint(options.out / "-".join(map(str, shape.values())), **shape)
    settings = {
        "input.path": make_corpus(options.out / f"corpus-{options.rows}", options.rows),
        "model.path": model,
        "prompt.template": "describe the image .",
        "generate.max_new_tokens": options.new_tokens,
        "generate.retries": 0,  # random weights loop, and what is measured is speed
        "generate.batch_size": options.unit,
        "encode.batch_size": options.unit,
        "unit.images": options.unit,
        "mlflow.enabled": "false",
        "run.samples": 0,
        "run.progress_seconds": 60,
    }
    runs: dict[str, list[dict[str, float]]] = {"none": [], "otprune": []}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for _ in range(options.runs):
        for method, done in runs.items():
            own = {"prune.method": method, "prune.retention": options.retention, "output.path": options.out / method}
            done.append(caption(settings | own))
    ray.shutdown()
    result = {}
    for method, done in runs.items():
        rate = statistics.median(metrics["images_per_second"] for metrics in done)
        stages = {
            name.removeprefix("seconds/"): statistics.median(metrics[name] for metrics in done)
            for name in done[0]
            if name.startswith("seconds/")
        }
        result[method] = {"images_per_second": rate, "seconds": stages}
        print(f"{method:<8} {rate:7.3f} images/s; " + ", ".join(f"{k} {v:.1f} s" for k, v in stages.items()))
    pairs = zip(runs["none"], runs["otprune"], strict=True)
    ratio = statistics.median(b["images_per_second"] / a["images_per_second"] for a, b in pairs)
    print(json.dumps(shape | {"rows": options.rows, "retention": options.retention, "ratio": ratio} | result))


if __name__ == "__main__":
    main()
