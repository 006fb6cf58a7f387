"""Small corpora, stages without models, readers of what a job wrote, an S3 server, and drivers that can be killed."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.load import load_config
from pipelines.preflight.gate import pass_gate
from pipelines.report.write import report_captions
from pipelines.run.job import Actors, Job, prepare
from pipelines.run.outcome import Outcome
from pipelines.run.run import run_job
from pipelines.run.stages import Stages, make_stages
from pipelines.stages.ragged import Ragged
from pipelines.stages.unit_batch import Answer, Question, UnitBatch
from pipelines.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = ("--config", str(REPOSITORY / "conf" / "demo.yaml"), f"model.path={REPOSITORY / 'demo' / 'checkpoint'}")
QUICK = (*DEMO, "generate.max_new_tokens=8", "mlflow.enabled=false", "run.samples=0", "faults.no_progress_seconds=120")
LOCAL = "ray.address=none"  # the stages in this process
# Set before any Ray starts, whose workers inherit them; no test is to meet somebody's real account.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_corpus(path: Path, images: Sequence[bytes | None], rows_per_group: int = 8, **columns: Sequence) -> Path:
    """A Parquet file in the Hugging Face image layout, ids `row-<i>`, with further columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    ids = [f"row-{i}" for i in range(len(images))]
    table = pa.table({"id": ids, "image": pa.array(structs, IMAGE), **columns})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def read_rows(output: Store | Path, folder: str = "captions") -> list[dict[str, Any]]:
    """All rows of `captions` or `quarantine` of an output, with doubles if there are any."""
    store = output if isinstance(output, Store) else Store(str(output))
    files = [store.read(f"{folder}/{name}") for name in sorted(store.list(folder))]
    return [row for data in files for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def captions_of(output: Store | Path) -> list[tuple[str, int, str]]:
    """Sorted (source, row, caption), doubles included."""
    return sorted((row["source"], row["row"], row["caption"]) for row in read_rows(output))


def addresses(output: Store | Path) -> list[tuple[str, int]]:
    """Sorted (source, row) of everything captioned or quarantined, doubles included."""
    return sorted((r["source"], r["row"]) for folder in ("captions", "quarantine") for r in read_rows(output, folder))


def run_fake(
    *arguments: str, encoder: type | None = None, generator: type | None = None, on_ray: bool = False
) -> Outcome:
    """The whole job with `QUICK` settings, but for stages without models (or those given).

    In this process, unless the test asks what Ray does.
    """
    actors = Actors(encoder or fake_encoder(), generator or fake_generator())
    job = prepare(load_config([*QUICK, *([] if on_ray else [LOCAL]), *arguments]), actors)
    return run_captions(job, stages=light_stages)


def run_captions(job: Job, stages: Callable[[Job], Stages] = make_stages) -> Outcome:
    """The job with its gate and its report, as jobs/caption_corpus.py runs it."""
    return run_job(job, before=pass_gate, conclude=report_captions, stages=stages)


def light_stages(job: Job) -> Stages:
    """The stages of a job whose actors hold no models: of the arguments they get the one that loads no torch.

    On Ray each actor is a process, which would import torch and transformers for arguments that it ignores.
    """
    stages, arguments = make_stages(job), {"prune": job.config.prune}
    encode = stages.encode and replace(stages.encode, arguments=arguments)
    return replace(stages, encode=encode, generate=replace(stages.generate, arguments=arguments))


def question(prompt: str = "what ?", **fields: Any) -> Question:
    """A question of some benchmark, with those of its fields that a test is about."""
    names = {"benchmark": "demo", "question_id": "q", "group_id": "", "image_id": "", "category": "", "kind": "short"}
    about = {"question": prompt, "hint": None, "choices": [], "answers": [], "source": "a.parquet", "row": 0}
    return Question(**{**names, **about, "prompt": prompt, "max_new_tokens": 40, **fields})


# The classes are local to a function, so that they travel to the actors by value: no import of models there.


def fake_encoder(folder: Path | None = None, seconds: float = 0.0) -> type:
    """An encoder without a model: one empty token an image, `seconds` a unit.

    Leaves a file `<unit>.<process id>` in `folder` when it begins a unit.
    """

    class FakeEncoder:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            if folder:
                (folder / f"{unit_batch.unit.name}.{os.getpid()}").touch()
            with unit_batch.timed("encode"):
                time.sleep(seconds)
            for image in unit_batch.images:
                image.num_visual_tokens = 256
            rows = [np.zeros((1, 1), np.float32)] * len(unit_batch.images)
            unit_batch.arrays = {"tokens": Ragged.of(rows, np.empty((0, 1), np.float32))}
            return unit_batch.to_row()

    return FakeEncoder


def fake_generator() -> type:
    """A generator without a model: the caption names the image's bytes and the prompt."""

    class FakeGenerator:
        def __init__(self, **_: object) -> None:
            pass

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            for image in unit_batch.images:
                texts = [f"{image.sha256} {prompt}" for prompt in image.prompts]
                image.answers = [Answer(text, 25, 31, 2, "stop") for text in texts]
            unit_batch.arrays = {}
            return unit_batch.to_row()

    return FakeGenerator


def killing(stage: type, victims: set[str]) -> type:
    """`stage`, whose process dies whenever a unit holds an image with one of these sha256."""

    class Killing(stage):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            if victims & {image.sha256 for image in UnitBatch.from_row(row).images}:
                os._exit(1)
            return super().__call__(row)

    return Killing


class Driver:
    """`jobs/caption_corpus.py` in a process and session of its own, with its own embedded Ray."""

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None):
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/caption_corpus.py", *arguments],
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what is left of the session, which is this driver's alone."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(30)

    def members(self, prefix: str = "") -> list[psutil.Process]:
        """Live processes of the session, the driver, its Ray and its workers, whose names begin with `prefix`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                alive = os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE
                if alive and process.name().startswith(prefix):
                    found.append(process)
        return found

    def wait_for_commits(self, output: Store, count: int, seconds: float = 200) -> None:
        """Returns once the output holds `count` committed units; fails if the driver ends before."""
        end = time.monotonic() + seconds
        while len(output.list("captions")) < count:
            assert self.process.poll() is None, f"the driver ended early:\n{self.text()}"
            assert time.monotonic() < end, f"no {count} commits in {seconds} s:\n{self.text()}"
            time.sleep(0.02)

    def wait(self, seconds: float = 200) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver runs after {seconds} s:\n{self.text()}") from None

    def kill(self, everything: bool = True) -> None:
        """SIGKILL, to the driver with its Ray and workers or to the driver alone; returns when nothing can write.

        Of a driver killed alone, the workers that have work must end by themselves. Ray's agents may outlive it by
        minutes, and so may a worker that was only starting; `__exit__` ends them.
        """
        self.process.kill()
        end = time.monotonic() + 60
        while left := self.members("" if everything else "ray::Map"):
            assert time.monotonic() < end, f"left behind by a killed driver: {left}"
            if everything:  # one by one and again: Ray's workers are process groups of their own
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            time.sleep(0.1)
        self.process.wait(30)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def _heed_interrupts() -> None:
    """What a shell starts in the background, these tests perhaps, inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """The address of an S3 server on localhost, in memory, with empty `buckets`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        reset = urllib.request.Request(f"{address}/moto-api/reset", method="POST")
        urllib.request.urlopen(
            reset, timeout=30
        ).close()  # the buckets are the process's: an earlier server left its own
        for bucket in buckets:
            Store(f"s3://{bucket}", address).fs.mkdir(bucket)
        yield address
    finally:
        server.stop()
