"""Pieces, the units in which a study is computed, committed and resumed.

A piece is one call of a pure function, say one seed of one line of a table. Its result is one file,
`pieces/<experiment>/<name>-<digest>.parquet`. The digest covers everything that decides the content: function,
arguments, weights, version. So a rerun computes only missing pieces, a study with more seeds computes only the new
seeds, and a study with other settings never reads a result of earlier settings. An argument that does not decide the
content, such as the folder of the model, is not in the digest.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayError

import otprune
from pipelines.store import Store, in_threads
from pipelines.text import clean

FOLDER = "pieces"
IN_FLIGHT = 2  # tasks submitted for each CPU: enough that no CPU waits for the driver

Row = dict[str, Any]
Compute = Callable[..., list[Row]]


@dataclass(frozen=True)
class Piece:
    """One call, `compute(**arguments, **where)`. `arguments` are JSON and decide the result; `where` does not."""

    experiment: str
    name: str
    compute: Compute
    arguments: Mapping[str, Any]
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path of the piece's file inside the output folder."""
        decides = {"call": self.compute.__qualname__, "version": otprune.__version__, **self.arguments}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        return f"{FOLDER}/{self.experiment}/{self.name}-{digest}.parquet"


@dataclass(frozen=True)
class Model:
    """The demo checkpoint: its folder, and the digest of its weights."""

    folder: str
    weights: str


@dataclass(frozen=True)
class Conclusion:
    """The result of an experiment: tables, metrics for MLflow, and findings in sentences."""

    tables: Mapping[str, list[Row]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[str] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a piece: its seconds, and its error if it failed."""

    piece: Piece
    seconds: float
    error: str = ""  # empty if the piece is committed


def missing(pieces: Sequence[Piece], output: Store) -> list[Piece]:
    """The pieces that `output` does not hold. Costs one LIST for each experiment."""
    committed = {
        f"{FOLDER}/{name}/{leaf}"
        for name in {piece.experiment for piece in pieces}
        for leaf in output.list(f"{FOLDER}/{name}")
    }
    return [piece for piece in pieces if piece.path not in committed]


def commit(piece: Piece, output: Store) -> None:
    """Computes the piece and writes its file, as a whole or not at all."""
    rows = piece.compute(**piece.arguments, **piece.where)
    pq.write_table(pa.Table.from_pylist(rows), stream := io.BytesIO(), compression="zstd")
    output.write(piece.path, stream.getvalue())


def load(pieces: Sequence[Piece], output: Store) -> list[Row]:
    """All rows of the pieces, in the order of the pieces."""
    tables = in_threads(lambda piece: pq.read_table(io.BytesIO(output.read(piece.path))), pieces)
    return [row for table in tables for row in table.to_pylist()]


def compute_on_ray(pieces: Sequence[Piece], output: Store, retries: int = 2) -> Iterator[Finished]:
    """Commits every piece in a Ray task of one CPU, and yields each piece as it ends.

    A failed piece does not stop the others. Ray retries a task up to `retries` times if its process dies; an exception
    that the piece itself raises is final. If the caller stops early, the running tasks are cancelled.
    """
    task = ray.remote(num_cpus=1, max_retries=retries)(_run)
    waiting, running = list(pieces)[::-1], {}
    try:
        while waiting or running:
            # Read again in every round: an autoscaled cluster grows while the study runs.
            limit = IN_FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < limit:
                piece = waiting.pop()
                running[task.remote(piece, output)] = piece
            done, _ = ray.wait(list(running), timeout=1.0)
            for reference in done:
                piece = running.pop(reference)
                try:
                    seconds, error = ray.get(reference)
                except RayError as death:  # the process died at every try
                    seconds, error = 0.0, f"{type(death).__name__}: {clean(str(death), 300)}"
                yield Finished(piece, seconds, error)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _run(piece: Piece, output: Store) -> tuple[float, str]:
    """Commits the piece in its task: (seconds, error). The error is text, because an exception may not pickle."""
    started = time.perf_counter()
    try:
        commit(piece, output)
    except Exception as error:
        return time.perf_counter() - started, f"{type(error).__name__}: {clean(str(error), 300)}"
    return time.perf_counter() - started, ""
