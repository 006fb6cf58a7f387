"""One job of any family and engine over 48 photographs of mixed sizes, killed in its middle and resumed."""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.verify import main as verify
from pipelines.store import Store
from tests.helpers import LOCAL, Driver, addresses, read_rows, write_corpus

PICTURES = 48
UNITS = 24
ARGUMENTS = (
    *(LOCAL, "mlflow.enabled=false", "run.samples=0", "prompt.template=describe"),
    *("generate.max_new_tokens=8", "unit.images=2", "model.dtype=float32"),
)


@dataclass(frozen=True)
class Shown:
    """What a run that was killed and resumed showed."""

    committed: int
    """Units that stood in the output when the driver was dead."""
    rows: list[dict[str, Any]]
    seconds: float

    def __str__(self) -> str:
        visual, kept = ([row[f"num_{name}_tokens"] for row in self.rows] for name in ("visual", "kept"))
        return (
            f"killed after {self.committed} of {UNITS} units; {len(self.rows)} rows, {len(set(visual))} different "
            f"numbers of visual tokens from {min(visual)} to {max(visual)}, {sum(kept) / sum(visual):.1%} kept; "
            f"{self.seconds:.0f} s"
        )


def write_photographs(path: Path) -> Path:
    """48 pictures of 28 to 500 pixels a side, landscape, portrait, square and panorama, PNG and JPEG."""
    numbers = np.random.default_rng(0)
    sizes = np.exp(numbers.uniform(np.log(28), np.log(400), (PICTURES - 8, 2))).astype(int).tolist()
    sizes += [(224, 224), (56, 56), (60, 500), (500, 60), (300, 400), (400, 300), (28, 28), (29, 31)]
    images = []
    for i, (height, width) in enumerate(sizes):
        coarse = numbers.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(stream := io.BytesIO(), "JPEG" if i % 2 else "PNG")
        images.append(stream.getvalue())
    return write_corpus(path, images, rows_per_group=12)


def arguments_of(model: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    return [*ARGUMENTS, f"model.path={model}", f"input.path={corpus}", f"output.path={output}", *more]


def rows_of(output: Path) -> list[dict[str, Any]]:
    """All rows of the captions, in the order of the corpus, doubles included."""
    return sorted(read_rows(output), key=lambda row: (row["source"], row["row"]))


def killed_and_resumed(model: Path, corpus: Path, output: Path, *more: str, seconds: float = 300) -> Shown:
    """Kills a driver once it has committed something, starts it again, and checks that every row is there once."""
    begin, arguments, store = time.monotonic(), arguments_of(model, corpus, output, *more), Store(str(output))
    with Driver(output.with_suffix(".first"), *arguments) as driver:
        driver.wait_for_commits(store, UNITS // 4, seconds)
        driver.kill()
    committed = len(store.list("captions"))
    assert UNITS // 4 <= committed < UNITS, "it died in its middle"
    with Driver(output.with_suffix(".second"), *arguments) as driver:
        assert driver.wait(seconds) == 0, driver.text()
        assert f"{2 * committed} of {PICTURES} rows were done before this run" in driver.text()
    assert addresses(store) == [(corpus.name, row) for row in range(PICTURES)]
    assert verify([f"input.path={corpus}", f"output.path={output}"]) == 0
    return Shown(committed, rows_of(output), time.monotonic() - begin)
