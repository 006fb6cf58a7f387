"""Compares estimates with the full runs that they predict. Each runs in a process of its own, one after the other.

    OMP_NUM_THREADS=1 python -m benchmarks.estimate [--settings otprune,none,random] [dotted.key=value ...]

Prints a row for each setting when it is done: estimated seconds, dollars and bytes with their 90 % intervals, and the
true values of the run on the whole corpus. The corpus is the demo's.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.config.load import REPOSITORY, load_config
from pipelines.preflight.estimate import run_estimate
from pipelines.report.write import report_captions
from pipelines.run.job import prepare
from pipelines.run.run import run_job

SETTINGS = {
    "otprune": ["prune.retention=0.098"],
    "none": ["prune.method=none"],
    "random": ["prune.method=random", "prune.retention=0.25", "generate.max_new_tokens=16", "unit.images=32"],
}
COMMON = ["--config", str(REPOSITORY / "conf" / "demo.yaml"), "mlflow.enabled=false", "run.samples=0"]


def one(arguments: list[str]) -> dict:
    """Runs an estimate or a job in this process; returns its numbers."""
    job = prepare(load_config([*COMMON, *arguments]))
    if job.config.run.estimate:
        return run_estimate(job)[0].to_dict()
    outcome = run_job(job, conclude=report_captions)
    size = sum(sum(job.output.list(folder).values()) for folder in ("captions", "quarantine"))
    return {**outcome.metrics, "code": outcome.code, "output_bytes": size}


def in_a_process(*arguments: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.estimate", "--one", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, more: list[str]) -> str:
    """A row of the table: the estimate of a setting, and the truth."""
    folder = Path(tempfile.mkdtemp(prefix="estimate-"))
    try:
        arguments = [f"output.path={folder / 'out'}", *SETTINGS[name], *more]
        estimate = in_a_process(*arguments, "run.estimate=true")
        truth = in_a_process(*arguments)
    finally:
        shutil.rmtree(folder)
    cells = [name, f"{estimate['sample_images']}"]
    pairs = (
        (estimate["here"]["seconds"], truth["wall_seconds"], "{:.1f}"),
        (estimate["here"]["usd"], truth["usd_total"], "{:.5f}"),
        (estimate["output_bytes"], truth["output_bytes"], "{:.0f}"),
        (estimate["images"], truth["images_captioned"], "{:.0f}"),
    )
    for amount, real, shown in pairs:
        interval = f"{shown.format(amount['low'])} to {shown.format(amount['high'])}"
        outside = "" if amount["low"] <= real <= amount["high"] else " OUTSIDE"
        cells += [f"{shown.format(amount['value'])} ({interval})", f"{shown.format(real)}{outside}"]
    cells += [f"{estimate['fixed_seconds']:.1f}", f"{truth['startup_seconds']:.1f}"]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="of " + ", ".join(SETTINGS))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    known, more = parser.parse_known_args()
    if known.one:
        print(json.dumps(one(more)))
        return
    print("setting | sample | seconds | true | dollars | true | bytes | true | images | true | fixed s | start-up s")
    for name in known.settings.split(","):
        print(compare(name, more), flush=True)


if __name__ == "__main__":
    main()
