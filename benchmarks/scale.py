"""Memory and seconds of each stage in a job over many rows: does anything grow with the corpus?

    python benchmarks/scale.py [--rows 20000] [--out .cache/scale]

Captions a generated corpus (JPEG, several Parquet files, one with a single large row group) with a two-layer random
model, in a process of its own. Meanwhile samples the memory of the driver and of every Ray process. Prints the medians
of each quarter of the run, and JSON as the last line. Plots memory over time to OUT/memory.png.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.random_model import make_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 2.0


def make_corpus(folder: Path, rows: int) -> Path:
    """`rows` JPEGs of 320 x 240 in files of 4,000. The first is one row group, the others have row groups of 100."""
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(0)
    patterns = [rng.integers(0, 256, (15, 20, 3), dtype=np.uint8) for _ in range(64)]
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, start in enumerate(range(0, rows, 4000)):
        table = {"id": [], "image": []}
        for row in range(start, min(rows, start + 4000)):
            pattern = np.roll(patterns[row % 64], row // 64, axis=1)
            Image.fromarray(pattern).resize((320, 240)).save(stream := io.BytesIO(), "JPEG")
            table["id"].append(f"{row:08d}")
            table["image"].append({"bytes": stream.getvalue(), "path": None})
        schema = pa.schema([("id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
        group = 4000 if number == 0 else 100
        pq.write_table(pa.table(table, schema), temporary / f"{number:05d}.parquet", row_group_size=group)
    temporary.rename(folder)
    return folder


def sample_memory(driver: psutil.Process) -> dict[str, float]:
    """Unique memory (USS) in MiB of the driver, and of Ray's processes by kind."""
    sizes: dict[str, float] = defaultdict(float)
    for process in [driver, *driver.children(recursive=True)]:
        try:
            title = process.cmdline()[0].split()[0]
            name = re.sub(r"^ray::|\.\w+$", "", Path(title).name)  # ray::MapWorker(Map(Encoder)).submit
            sizes["driver" if process.pid == driver.pid else name] += process.memory_full_info().uss / 2**20
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return dict(sizes)


def watch(command: list[str]) -> tuple[int, list[tuple[float, dict[str, float]]]]:
    """Runs `command`; returns its exit code and samples of its memory: (seconds since the start, {process: MiB})."""
    start, samples = time.perf_counter(), []
    process = subprocess.Popen(command, cwd=REPOSITORY)
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        samples.append((time.perf_counter() - start, sample_memory(driver)))
        time.sleep(SAMPLE_SECONDS)
    return process.returncode, samples


def plot(samples: list[tuple[float, dict[str, float]]], kinds: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for kind in kinds:
        axes.plot([t for t, _ in samples], [sizes.get(kind, 0) for _, sizes in samples], label=kind)
    axes.set(xlabel="seconds", ylabel="MiB (USS)", title="Memory of the driver and of Ray's processes")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".cache" / "scale")
    options = parser.parse_args()
    corpus = make_corpus(options.out / f"corpus-{options.rows}", options.rows)
    model = make_checkpoint(options.out / "model", image_size=112)
    output = options.out / "output"
    shutil.rmtree(output, ignore_errors=True)
    settings = {
        "input.path": corpus,
        "output.path": output,
        "model.path": model,
        "prompt.template": "describe the image .",
        "generate.max_new_tokens": 8,
        "unit.images": 128,
        "generate.batch_size": 128,
        "encode.batch_size": 64,
        "run.progress_seconds": 20,
        "ray.object_store_mb": 512,
    }
    command = [sys.executable, "jobs/caption_corpus.py", *(f"{k}={v}" for k, v in settings.items())]
    code, samples = watch(command)
    record = json.loads((output / "run.json").read_text())
    last = samples[-1][0]
    quarters = [[s for t, s in samples if last * i / 4 <= t < last * (i + 1) / 4] for i in range(4)]
    kinds = sorted({kind for s in quarters[2] for kind, size in s.items() if size > 20})
    for kind in kinds:
        medians = [float(np.median([s.get(kind, 0) for s in quarter])) for quarter in quarters]
        print(f"{kind:<28} MiB by quarter of the run: " + "  ".join(f"{m:7.0f}" for m in medians))
    plot(samples, kinds, options.out / "memory.png")
    print(
        json.dumps(
            {
                "rows": options.rows,
                "exit_code": code,
                "wall_seconds": round(last, 1),
                "seconds": {k: round(v, 1) for k, v in record["totals"]["seconds"].items()},
                "images_per_second": round(record["last_run"]["images_per_second"], 1),
                "driver_mib": [round(float(np.median([s.get("driver", 0) for s in quarter]))) for quarter in quarters],
            }
        )
    )


if __name__ == "__main__":
    main()
