"""A corpus of tar shards whose job is killed: the driver first, then, in the run that goes on, a read task.

    python -m benchmarks.tar_killed [--shards 50] [--images 1000] [--out .cache/tar_killed]

Captions made-up shards with a tiny random model on an embedded Ray, one new token an image, and proves with
jobs/verify.py that every image is in the output exactly once. Samples the memory of the driver and of the read tasks.
Prints JSON as the last line.
"""

import argparse
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.random_model import make_checkpoint
from benchmarks.scale import REPOSITORY, sample_memory

SECONDS = 1.0  # between two samples
MOST_RUNS = 6  # on a busy machine, Ray may not start at once
READER = "ReadDecode"  # stands in the title of a process while it runs a read task
Samples = dict[str, list[float]]


def make_shards(folder: Path, shards: int, images: int) -> Path:
    """Shards of PNGs of 64 x 64, no two the same, each with a .txt and a .json as img2dataset writes them."""
    if folder.is_dir():
        return folder
    patterns = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(temporary / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * images, (shard + 1) * images):
                pixels = np.kron(patterns[number % 64], np.ones((8, 8, 1), np.uint8))
                pixels[0, :3] = np.frombuffer(number.to_bytes(9, "big"), np.uint8).reshape(3, 3)
                Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG", compress_level=1)
                members = {"png": stream.getvalue(), "txt": b"a caption", "json": b'{"width": 64}'}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    temporary.rename(folder)
    return folder


def run(command: list[str], log: Path, captions: Path, samples: Samples, victims: dict[str, int]) -> int:
    """Runs the job, kills each victim once so many parts are there and strikes it off. Returns the exit code."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True)
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        for name, size in sample_memory(driver).items():
            samples["a read task" if READER in name else name].append(size)
        victim = next(iter(victims), None)
        if victim is not None and num_parts(captions) >= victims[victim] and (target := find(driver, victim)):
            print(f"killed {victim} with {num_parts(captions)} parts committed", flush=True)
            target.send_signal(signal.SIGKILL)
            del victims[victim]
        time.sleep(SECONDS)
    return process.returncode


def num_parts(captions: Path) -> int:
    return len(list(captions.glob("part-*.parquet")))


def find(driver: psutil.Process, victim: str) -> psutil.Process | None:
    """The driver, or a process that runs a read task now."""
    if victim == "driver":
        return driver
    for process in driver.children(recursive=True):
        try:
            if READER in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=50)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".cache" / "tar_killed")
    parser.add_argument("--keep", action="store_true", help="go on with the output that is there")
    options = parser.parse_args()
    corpus = make_shards(options.out / f"corpus-{options.shards}x{options.images}", options.shards, options.images)
    output = options.out / "output"
    if not options.keep:
        shutil.rmtree(output, ignore_errors=True)
    settings = {
        "input.path": corpus,
        "input.cache": options.out / "cache",
        "output.path": output,
        "model.path": make_checkpoint(options.out / "model", image_size=56),
        "prune.retention": 0.25,
        "prompt.template": "describe the image .",
        "generate.max_new_tokens": 1,
        "generate.batch_size": 128,
        "encode.batch_size": 128,
        "unit.images": 128,
        "mlflow.enabled": "false",
        "ray.object_store_mb": 512,
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "jobs/caption_corpus.py", *arguments]
    parts = options.shards * -(-options.images // 128)
    samples: Samples = defaultdict(list)
    victims = {"driver": parts // 4, READER: parts // 2}
    report = {"images": options.shards * options.images, "runs": []}
    while not report["runs"] or (report["runs"][-1]["exit"] and len(report["runs"]) < MOST_RUNS):
        began, before = time.perf_counter(), num_parts(output / "captions")
        log = options.out / f"run{len(report['runs'])}.log"
        code = run(command, log, output / "captions", samples, victims)
        seconds = round(time.perf_counter() - began)
        added = num_parts(output / "captions") - before
        report["runs"].append({"exit": code, "seconds": seconds, "parts": added})
    report["not_killed"] = list(victims)
    verified = subprocess.run([sys.executable, "jobs/verify.py", *arguments], cwd=REPOSITORY, capture_output=True)
    print(verified.stdout.decode(), verified.stderr.decode()[-2000:])
    report["verify"] = verified.returncode
    report["mib"] = {name: [round(np.median(s)), round(max(s))] for name, s in samples.items() if max(s) > 50}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
