"""The eleven image benchmarks of the DivPrune and OTPrune papers, and those of the demo worlds.

    bench = get_benchmark("pope")
    bench.check_schema(parquet_schema)
    for row in bench.rows(table, first_row):        # questions with images, in the common row schema
        ... bench.prompt(row), bench.max_new_tokens ...
    scores = bench.score(records)                   # rows with predictions, without images

A benchmark does not pickle: pass it to another process by its name.

GQA keeps its images in a second table: `bench.rows(table, first_row, bench.image_lookup(image_table))`.
"""

import difflib
from collections.abc import Sequence

from pipelines.benchmarks.benchmark import Benchmark, Key, whole_groups
from pipelines.benchmarks.captions import COCO, FLICKR30K, NOCAPS
from pipelines.benchmarks.demo import DEMO, GALLERY
from pipelines.benchmarks.mmbench import MMBENCH
from pipelines.benchmarks.mme import MME
from pipelines.benchmarks.mmmu import MMMU
from pipelines.benchmarks.multiple_choice import SCIENCEQA, SEEDBENCH
from pipelines.benchmarks.rows import RECORD_COLUMNS, RECORDS, Record, Row
from pipelines.benchmarks.scoring import Comparison, Scores
from pipelines.benchmarks.short_answers import GQA, OK_VQA, POPE

PUBLISHED = (COCO, FLICKR30K, GQA, MMBENCH, MME, MMMU, NOCAPS, OK_VQA, POPE, SCIENCEQA, SEEDBENCH)
_BY_NAME = {bench.name: bench for bench in (*PUBLISHED, *DEMO, *GALLERY)}
_SETS = {"all": PUBLISHED, "demo": DEMO, "gallery": GALLERY}

__all__ = [
    "DEMO",
    "GALLERY",
    "PUBLISHED",
    "RECORDS",
    "RECORD_COLUMNS",
    "Benchmark",
    "Comparison",
    "Key",
    "Record",
    "Row",
    "Scores",
    "get_benchmark",
    "get_benchmarks",
    "whole_groups",
]


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: if there is no such benchmark. The message lists all of them.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"benchmark must be one of {', '.join(_BY_NAME)}, got {name!r}{hint}")
    return _BY_NAME[name]


def get_benchmarks(names: str | Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name, each once and in the order of `names`.

    `all` stands for the eleven of the papers, `demo` and `gallery` for those of the demo worlds.

    Raises:
        ValueError: as `get_benchmark`, or if `names` is empty.
    """
    names = [names] if isinstance(names, str) else list(names)
    found = [bench for name in names for bench in (_SETS[name] if name in _SETS else [get_benchmark(name)])]
    if not found:
        raise ValueError(f"benchmarks must name at least one of all, demo, gallery, {', '.join(_BY_NAME)}, got none")
    return list({bench.name: bench for bench in found}.values())
