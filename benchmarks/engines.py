"""The same corpus end to end on three engines: stock Ray Data LLM with vLLM, this job with vLLM and with transformers.

    .venv-vllm/bin/python -m benchmarks.engines [--images 32] [--arms stock,vllm,transformers]

Needs an environment with vLLM. The model is random, with LLaVA-1.5-7B's proportions: 336 pixels, 576 visual tokens, a
language model of 12 layers x 768 and a vision tower of 9 layers x 192. LLaVA-1.5-7B has 32 x 4096 and 24 x 1024; both
depths and both widths are divided by the same numbers. (`--vision 12x384` is a tower five times as heavy.) Each image
gets 32 new tokens. The arms run one after the other, each in a process of its own. images/s count from the first unit,
so they exclude start-up; the last line is JSON. KV memory is that of one prompt with its answer: 2 x layers x width x 4
bytes a token. On a GPU, every arm runs in bfloat16 (2 bytes), and vLLM uses CUDA graphs; on a CPU, every arm runs in
float32 without them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.random_model import make_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
LAYERS, WIDTH, SIZE, NEW_TOKENS = 12, 768, 336, 32
SLOTS, UNIT = 16, 4
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ENGINE = {"max_num_seqs": SLOTS, "max_model_len": 1024, "kv_cache_memory_bytes": 2**31}
STOCK = {"dtype": str(DTYPE).removeprefix("torch."), "enforce_eager": not ON_GPU}  # this job sets both by itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--arms", default="stock,vllm,transformers", help="also vllm_unpruned")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "otprune_engines")
    parser.add_argument("--vision", default="9x192", help="LAYERSxWIDTH of the vision tower")
    arguments = parser.parse_args()
    vision_layers, vision_width = map(int, arguments.vision.split("x"))
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(
        folder / f"model-{arguments.vision}",
        image_size=SIZE,
        vision_width=vision_width,
        vision_layers=vision_layers,
        width=WIDTH,
        layers=LAYERS,
        endless=True,
    )
    corpus = write_corpus(folder / f"corpus-{arguments.images}.parquet", arguments.images)
    results = {}
    for name in arguments.arms.split(","):
        results[name] = stock(model, corpus) if name == "stock" else ours(name, model, corpus, folder)
        tokens = results[name]["prompt_tokens"] + NEW_TOKENS
        results[name]["kv_mib_per_image"] = round(2 * LAYERS * WIDTH * DTYPE.itemsize * tokens / 2**20, 1)
        print(name, json.dumps(results[name]), flush=True)
    if {"stock", "vllm"} <= results.keys():
        ratio = results["vllm"]["images_per_second"] / results["stock"]["images_per_second"]
        print(f"ours with vLLM at 9.8 % / stock, unpruned: {ratio:.2f}")
    print(json.dumps(results))


def write_corpus(path: Path, count: int) -> Path:
    """Writes `count` JPEGs of smooth noise, which have roughly the size and the entropy of photographs."""
    import io

    from PIL import Image

    choice, rows = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(choice.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(stream := io.BytesIO(), "JPEG", quality=90)
        rows.append({"id": f"{i:06d}", "image": {"bytes": stream.getvalue(), "path": f"{i}.jpg"}})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=UNIT)
    return path


def stock(model: Path, corpus: Path) -> dict[str, Any]:
    options = ["--model", str(model), "--input", str(corpus), "--engine", json.dumps(ENGINE | STOCK)]
    done = run([sys.executable, "-m", "benchmarks.stock_ray_llm", *options, "--batch-size", str(UNIT)])
    return json.loads(done.splitlines()[-1])


def ours(name: str, model: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    output = folder / f"out-{name}-{time.time_ns()}"
    engine = [f"engine.kwargs.{key}={value}" for key, value in ENGINE.items()] if name != "transformers" else []
    settings = {
        "model.path": model,
        "input.path": corpus,
        "output.path": output,
        "prompt.template": "describe the image .",
        "prune.method": "none" if name == "vllm_unpruned" else "otprune",
        "engine.name": "transformers" if name == "transformers" else "vllm",
        "generate.max_new_tokens": NEW_TOKENS,
        "generate.retries": 0,  # random weights loop, and what is measured is speed
        "generate.batch_size": SLOTS,
        "unit.images": UNIT,
        "encode.num_cpus": 2,  # threads; the stock arm's vision tower runs in vLLM, which also uses every core
        "run.samples": 0,
        "mlflow.enabled": "false",
    }
    run([sys.executable, "jobs/caption_corpus.py", *(f"{k}={v}" for k, v in settings.items()), *engine])
    record = json.loads((output / "run.json").read_text())
    metrics = record["last_run"]
    stages = {k.removeprefix("seconds/"): round(v, 1) for k, v in metrics.items() if k.startswith("seconds/")}
    return {
        "images": metrics["images_captioned"],
        "images_per_second": round(metrics["images_per_second"], 4),
        "wall_seconds": round(metrics["wall_seconds"], 2),
        "prompt_tokens": metrics["mean_prompt_tokens"],
        "new_tokens": metrics["mean_caption_tokens"],
        "seconds": stages,
    }


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
