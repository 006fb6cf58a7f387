"""Images a second of one read task from S3 at 40 ms a request, and what it reads of files with large row groups.

    python -m benchmarks.reading [--images 512] [--rows 100 16384 122880]

An S3 server on localhost, in a process of its own, stands behind a proxy that hands on what a client sends after 40 ms.
The images are small PNGs: requests are what counts. The second part reads local files and counts the bytes that are
asked for. Prints JSON as the last line.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import socket
import tarfile
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from otprune.families.llava import Square
from pipelines.corpus.fetch import FetchSettings
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.output.plan import plan_everything
from pipelines.output.span import SpanRow
from pipelines.stages.read import DecodeSettings, ReadDecode
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store, make_store

LATENCY = 0.04
BYTES_A_ROW = 4000
ACCOUNT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


def delayed(port: int) -> str:
    """The address of a proxy of localhost:`port` whose clients wait LATENCY for each request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, seconds: float) -> None:
        try:
            while data := source.recv(65536):
                time.sleep(seconds)
                target.sendall(data)
        except OSError:
            pass

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(client, server, LATENCY), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, 0.0), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def serve(pipe: Connection) -> None:
    """Serves S3 until the pipe closes. Sends the address of the server, and that behind the proxy."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").disabled = True
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    pipe.send((f"http://{host}:{port}", delayed(port)))
    pipe.recv()


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number % 16).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG", compress_level=1)
    return stream.getvalue()


def shard(num_images: int) -> bytes:
    """A WebDataset shard of the images, each with a text."""
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as tar:
        for i in range(num_images):
            for suffix, data in (("png", png(i)), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def corpus_at(store: Store) -> Corpus:
    return find_corpus(store, image_column="auto", id_column="auto", reference_column="auto", templates=["x"])


def reader_of(corpus: Corpus) -> ReadDecode:
    """A reader of small pictures."""
    geometry = Square(side=56, num_tokens=4, background=(0, 0, 0), fit="crop")
    return ReadDecode(
        store=corpus.store,
        format=corpus.format,
        columns=corpus.columns,
        templates=["x"],
        decode=DecodeSettings(geometry, 2**26, 10**8, 2),
        fetch=FetchSettings(),
        patience=0,
    )


def read(corpus: Corpus) -> tuple[int, float]:
    """(images, seconds) of one read task that reads the whole corpus."""
    reader, start, images = reader_of(corpus), time.perf_counter(), 0
    for units, groups in plan_everything(corpus, "f", num_images=128, limit=None):
        for row in reader(SpanRow(units, groups, 0).to_row()):
            images += len(UnitBatch.from_row(row).images)
    return images, time.perf_counter() - start


def measure_s3(num_images: int) -> dict[str, float]:
    """Images a second of a folder of image files, of addresses, of Parquet with row groups of 128, and of a shard."""
    os.environ |= ACCOUNT
    pipe, end = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(end,), daemon=True)
    server.start()
    fast, slow = pipe.recv()
    direct = Store("s3://images", fast)
    direct.fs.mkdir("images")
    for i in range(num_images):
        direct.write(f"folder/{i:05d}.png", png(i))
    tables = {
        "addresses": pa.table({"url": [f"s3://images/folder/{i:05d}.png" for i in range(num_images)]}),
        "parquet": pa.table({"image": [png(i) for i in range(num_images)]}),
    }
    for name, table in tables.items():
        pq.write_table(table, stream := io.BytesIO(), row_group_size=128)
        direct.write(f"{name}/a.parquet", stream.getvalue())
    direct.write("tar/a.tar", shard(num_images))
    rates = {}
    for name in ("folder", *tables, "tar"):
        corpus = corpus_at(Store(f"s3://images/{name}", slow))
        images, seconds = read(corpus)
        assert images == num_images
        rates[name] = round(images / seconds, 1)
        print(f"S3 {name}: {rates[name]} images/s of one read task at {1000 * LATENCY:.0f} ms", flush=True)
    pipe.send(None)
    server.join(5)
    return rates


def measure_row_groups(rows: int) -> float:
    """Bytes read over the bytes of a file of one row group of `rows` rows (of ten, if they are few)."""
    read_bytes, plain = Counter(), LocalFileSystem.cat_file

    def counted(self, path, start=None, end=None, **options):
        data = plain(self, path, start=start, end=end, **options)
        read_bytes["sum"] += len(data)
        return data

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        rng, schema = np.random.default_rng(0), pa.schema([("image", pa.binary())])
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for _ in range(10 if rows < 1000 else 1):
                images = pa.array([rng.bytes(BYTES_A_ROW) for _ in range(rows)], pa.binary())
                writer.write_table(pa.table({"image": images}), row_group_size=rows)
        corpus = corpus_at(make_store(folder))
        LocalFileSystem.cat_file = counted
        try:
            read(corpus)
        finally:
            LocalFileSystem.cat_file = plain
        return read_bytes["sum"] / path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="*", default=[100, 16_384, 122_880])
    arguments = parser.parse_args()
    rates = measure_s3(arguments.images)
    ratios = {}
    for rows in arguments.rows:
        ratios[str(rows)] = round(measure_row_groups(rows), 2)
        print(f"row groups of {rows} rows: {ratios[str(rows)]} times the bytes of the file are read", flush=True)
    print(json.dumps({"images_per_second": rates, "bytes_read": ratios}))


if __name__ == "__main__":
    main()
