"""S3 requests of a job by format: what planning, reading, committing and resuming ask for.

    python -m benchmarks.s3_requests [--images 512] [--unit 128] [--shard 256]

A server on localhost counts. The pictures are small PNGs in units of 128, and in shards (Parquet, tar) of 256. A second
plan resumes the complete output. Prints JSON as the last line.
"""

import argparse
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.reading import ACCOUNT, reader_of
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.output.plan import make_plan
from pipelines.stages.unit_batch import Answer, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store

FINGERPRINT = "0123456789abcdef"
KINDS = ("image files", "Parquet", "Parquet of addresses", "tar")


class Count(logging.Handler):
    """Counts the requests that the server logs, by method."""

    def __init__(self) -> None:
        super().__init__()
        self.by_method: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if match := re.search("(GET|HEAD|PUT|POST|DELETE) /", text):  # coloured by the answer's code
            self.by_method["LIST" if match[1] == "GET" and "list-type" in text else match[1]] += 1

    def take(self) -> dict[str, int]:
        taken, self.by_method = dict(self.by_method), Counter()
        return taken


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def put_corpus(store: Store, kind: str, images: list[bytes], shard: int) -> None:
    files = [f"{i:06d}.png" for i in range(len(images))]
    if kind == "image files":
        for name, data in zip(files, images, strict=True):
            store.write(name, data)
        return
    if kind == "Parquet of addresses":
        pictures = Store(f"{store.path}-pictures", store.endpoint_url)
        for name, data in zip(files, images, strict=True):
            pictures.write(name, data)
    for start in range(0, len(images), shard):
        names, stream = files[start : start + shard], io.BytesIO()
        if kind == "tar":
            with tarfile.open(fileobj=stream, mode="w") as archive:
                for name, data in zip(names, images[start:], strict=False):
                    (member := tarfile.TarInfo(name)).size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        else:
            addresses = [f"{store.path}-pictures/{name}" for name in names]
            values = images[start : start + shard] if kind == "Parquet" else addresses
            pq.write_table(pa.table({"image" if kind == "Parquet" else "url": values}), stream, row_group_size=128)
        store.write(f"{start:06d}.{'tar' if kind == 'tar' else 'parquet'}", stream.getvalue())


def plan(store: Store, output: Store, num_images: int) -> tuple[Corpus, list]:
    corpus = find_corpus(store, image_column="auto", id_column="auto", reference_column="auto", templates=["x"])
    planned = make_plan(corpus, output, FINGERPRINT, num_images=num_images, limit=None, num_samples=0)
    return corpus, planned.spans


def measure(address: str, kind: str, count: Count, num_images: int, unit: int, shard: int) -> dict[str, object]:
    store = Store(f"s3://bench/{kind.replace(' ', '-')}", address)
    output = Store(f"{store.path}-out", address)
    put_corpus(store, kind, [png(i) for i in range(num_images)], shard)
    sink = Sink(store=output, fingerprint=FINGERPRINT, model="m", method="none")
    count.take()
    corpus, spans = plan(store, output, unit)
    taken = {"plan": count.take()}
    reader = reader_of(corpus)
    batches = [UnitBatch.from_row(row) for span in spans for row in reader(span.to_row())]
    taken["read"] = count.take()
    assert sum(len(batch.images) for batch in batches) == num_images, [batch.error for batch in batches]
    for batch in batches:
        batch.arrays = {}
        for image in batch.images:
            image.answers = [Answer("a caption", 1, 2, 3, "stop")]
        sink.commit(batch)
    taken["commit"] = count.take()
    assert plan(store, output, unit)[1] == []
    taken["resume"] = count.take()
    return {"kind": kind, "images": num_images, "shards": -(-num_images // shard), "units": len(batches), **taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--unit", type=int, default=128)
    parser.add_argument("--shard", type=int, default=256)
    options = parser.parse_args()
    from moto.server import ThreadedMotoServer

    os.environ |= ACCOUNT
    server, count = ThreadedMotoServer("127.0.0.1", 0, verbose=True), Count()
    logger = logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(count)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    Store("s3://bench", address).fs.mkdir("bench")
    report = []
    for kind in KINDS:
        report.append(measure(address, kind, count, options.images, options.unit, options.shard))
        print(report[-1], flush=True)
    server.stop()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
