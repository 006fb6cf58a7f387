"""Two drivers on one output at random moments: is every row there exactly once, and as a single driver writes it?

    python -m benchmarks.two_drivers [--rounds 20] [--out .cache/two_drivers]

Captions 60 pictures, of which four are broken, in units of 4 with stages that hold no model; the first half of the
rounds from Parquet with row groups of 17, the second from image files. Three kinds of rounds:

    refused   a second driver starts at a random moment of the first
    killed    the first is killed (SIGKILL) at a random moment, and the second starts at a random moment before or after
    blind     somebody deletes the lease as soon as it is there, so that both drivers write

At the end of each round a further driver completes the output. Prints a line for each round, and JSON as the last line.
The drivers are forks of one process that has imported everything, so a run takes about a second.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.verify import main as verify
from pipelines.config.keys import Config
from pipelines.config.load import REPOSITORY
from pipelines.entry import enter
from pipelines.output.lease import FOLDER
from pipelines.report.write import report_captions
from pipelines.run.job import Actors, prepare
from pipelines.run.run import run_job
from pipelines.stages.unit_batch import Answer, UnitBatch

ROWS, BROKEN, GROUP, UNIT = 60, (3, 17, 18, 44), 17, 4
UNIT_SECONDS = 0.03
KINDS = ("refused", "killed", "blind")


class Encoder:
    """Stands for the vision tower: takes its time, and makes no tokens."""

    def __init__(self, **_: object):
        pass

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch = UnitBatch.from_row(row)
        time.sleep(UNIT_SECONDS)
        unit_batch.arrays = {}
        return unit_batch.to_row()


class Generator(Encoder):
    """Stands for the language model: a caption names the bytes of its image."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch = UnitBatch.from_row(row)
        for image in unit_batch.images:
            image.answers = [Answer(image.sha256, 1, 2, 3, "stop")]
        return unit_batch.to_row()


def caption(arguments: list[str]) -> int:
    """jobs/caption_corpus.py with these stages."""

    def run(config: Config) -> int:
        outcome = run_job(prepare(config, Actors(Encoder, Generator)), conclude=report_captions)
        print(outcome.message)
        return outcome.code

    return enter(arguments, run, None, Config)


def make_corpora(folder: Path) -> tuple[Path, Path]:
    """The same pictures in a Parquet file and as files."""
    rng, files, parquet = np.random.default_rng(0), folder / "files", folder / "parquet"
    shutil.rmtree(folder, ignore_errors=True)
    files.mkdir(parents=True)
    parquet.mkdir()
    images = []
    for row in range(ROWS):
        pattern = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        pattern.resize((160, 120)).save(stream := io.BytesIO(), "PNG")
        images.append(b"no picture" if row in BROKEN else stream.getvalue())
        (files / f"{row:03d}.png").write_bytes(images[-1])
    pq.write_table(pa.table({"image": images}), parquet / "a.parquet", row_group_size=GROUP)
    return parquet, files


def start(job: Callable[[list[str]], int], arguments: list[str], log: Path, delay: float = 0.0) -> int:
    """Runs a job in a fork of this process, `delay` seconds from now. Returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        time.sleep(delay)
        code = job(arguments)
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    """The exit code of a child; of one that was killed, minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows_of(output: Path) -> list[tuple]:
    """(folder, source, row, caption or reason) of everything in the output, doubles included."""
    rows = []
    for folder, column in (("captions", "caption"), ("quarantine", "reason")):
        for part in (output / folder).glob("part-*.parquet"):
            table = pq.read_table(part, columns=["source", "row", column]).to_pylist()
            rows += [(folder, row["source"], row["row"], row[column]) for row in table]
    return sorted(rows)


def play(kind: str, arguments: list[str], output: Path, log: Path, rng: random.Random, seconds: float) -> list[int]:
    """One round: two drivers, of which the first may be killed. Returns their exit codes."""
    first = start(caption, arguments, log)
    kill_at = rng.uniform(0.1, seconds) if kind == "killed" else None
    second = start(caption, arguments, log, delay=rng.uniform(0, 1.2 * seconds if kind == "killed" else 0.9 * seconds))
    running, codes, began = {first, second}, {}, time.monotonic()
    while running:
        if kind == "blind":
            shutil.rmtree(output / FOLDER, ignore_errors=True)
        if kill_at is not None and time.monotonic() - began > kill_at and first in running:
            os.kill(first, signal.SIGKILL)
            kill_at = None
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[first], codes[second]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".cache" / "two_drivers")
    options = parser.parse_args()
    corpora = make_corpora(options.out / "corpus")
    log = options.out / "log.txt"
    log.unlink(missing_ok=True)
    common = [
        *("ray.address=none", "mlflow.enabled=false", "run.samples=0", "prompt.template=describe the image ."),
        *(f"model.path={REPOSITORY / 'demo' / 'checkpoint'}", f"unit.images={UNIT}", "faults.max_rejected=1"),
    ]
    expected, seconds = {}, 0.0
    for corpus in corpora:
        output = options.out / "alone" / corpus.name
        shutil.rmtree(output, ignore_errors=True)
        began = time.monotonic()
        if exit_code(start(caption, [*common, f"input.path={corpus}", f"output.path={output}"], log)):
            sys.exit(f"the undisturbed run failed: {log}")
        seconds, expected[corpus] = time.monotonic() - began, rows_of(output)
    report: dict[str, Any] = {"seconds_of_one_driver": round(seconds, 2)}
    wrong, ends, resumed = Counter(), {kind: Counter() for kind in options.kinds}, {kind: [] for kind in options.kinds}
    for number in range(options.rounds):
        for kind in options.kinds:
            rng, corpus = random.Random(f"{kind} {number}"), corpora[number * 2 // options.rounds]
            output = options.out / "output"
            shutil.rmtree(output, ignore_errors=True)
            arguments = [*common, f"input.path={corpus}", f"output.path={output}"]
            codes = play(kind, arguments, output, log, rng, seconds)
            ends[kind][" and ".join(map(str, codes))] += 1
            began = time.monotonic()
            last = exit_code(start(caption, arguments, log))
            resumed[kind].append(time.monotonic() - began)
            proof = exit_code(start(verify, arguments, log))
            is_wrong = bool(last or proof or rows_of(output) != expected[corpus])
            wrong[kind] += is_wrong
            print(f"{kind} {number}: exit codes {codes}, {'WRONG' if is_wrong else 'right'}", flush=True)
    for kind in options.kinds:
        report[kind] = {"rounds": options.rounds, "wrong": wrong[kind], "exit_codes": dict(ends[kind])}
        report[kind] |= {"longest_resume_seconds": round(max(resumed[kind]), 2)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
