"""Seconds and memory of planning and of a resume for a corpus of made-up metadata: no image is read.

    python benchmarks/planning.py images --files 1000000
    python benchmarks/planning.py tar --files 100000        # shards of 1,000 images whose index is in the cache
    python benchmarks/planning.py parquet --files 1280      # files of 100,000 rows in row groups of 1,000

Each kind runs in a process of its own, because memory is the peak of the process.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.corpus.columns import ColumnChoice
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.find import Corpus
from pipelines.corpus.formats import images, parquet, tar, tar_index
from pipelines.corpus.index_cache import FileIndex, name_in_cache, save
from pipelines.corpus.listing import Listing
from pipelines.output.plan import make_plan
from pipelines.store import Store, make_store

FINGERPRINT = "0123456789abcdef"
ROWS, GROUPS, IMAGE_BYTES = 1000, 16, 300_000


def image_files(num_files: int, folder: Path) -> Corpus:
    sizes = {f"{i // 1000:04d}/{i:09d}.jpg": 100_000 + i for i in range(num_files)}
    listing = Listing(make_store("memory://in"), sizes)
    found = images.find_files(listing, list(sizes), ColumnChoice("auto", "auto", "auto", ("x",)))
    return Corpus(listing.store, tuple(found.files), images.FORMAT)


def shards(num_files: int, folder: Path) -> Corpus:
    """Shards whose index an earlier plan has kept."""
    size, rows = ROWS * IMAGE_BYTES, tuple([64] * (GROUPS - 1) + [ROWS - 64 * (GROUPS - 1)])
    offsets = (*(64 * IMAGE_BYTES * i for i in range(GROUPS)), size)
    names = [f"{i:06d}.tar" for i in range(num_files)]
    store, cache = make_store("memory://in"), Store(str(folder))
    known = {name: ((size, "1"), FileIndex(rows, tuple(o + 0 for o in offsets), {})) for name in names}
    save(cache, name_in_cache(store, tar_index.TITLE, tar_index.settings("auto")), known)
    del known
    began = time.perf_counter()
    listing = Listing(store, dict.fromkeys(names, size), dict.fromkeys(names, "1"), cache=cache)
    indices = tar_index.index_shards(listing, names, "auto")
    files = (CorpusFile(n, size, i.rows, i.offsets) for n, i in zip(names, indices, strict=True))
    corpus = Corpus(store, tuple(files), tar.FORMAT)
    print(json.dumps({"index_seconds": round(time.perf_counter() - began, 2)}))
    return corpus


def parquet_files(num_files: int, folder: Path) -> Corpus:
    """Files of which the footers have been read."""
    files = (CorpusFile(f"{i:06d}.parquet", 100 * ROWS * IMAGE_BYTES, (ROWS,) * 100) for i in range(num_files))
    return Corpus(make_store("memory://in"), tuple(files), parquet.FORMAT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["images", "tar", "parquet"])
    parser.add_argument("--files", type=int, default=10_000)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        corpus = {"images": image_files, "tar": shards, "parquet": parquet_files}[arguments.kind](
            arguments.files, Path(folder)
        )
    output = make_store("memory://out")
    report = {"kind": arguments.kind, "files": len(corpus.files), "rows": corpus.num_rows, "units": 0}
    for name in ("plan", "resume"):
        began = time.perf_counter()
        plan = make_plan(corpus, output, FINGERPRINT, num_images=128, limit=None, num_samples=24, tidy=False)
        report[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
        report["units"] = report["units"] or len(plan.units)
        if name == "plan":
            commit(output, [unit.part for unit in plan.units[::2]])  # every second unit
    report["left"] = len(plan.units)
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(report))


def commit(output: Store, parts: list[str]) -> None:
    """Puts parts into the in-memory store. They are one empty file: a plan reads their names alone."""
    output.write("captions/empty", b"")
    files = output.fs.store
    empty = files.pop(output.join("captions", "empty"))
    files.update((output.join("captions", part), empty) for part in parts)


if __name__ == "__main__":
    main()
