"""Mutates pictures of nine formats and decodes them: no crash, no hang, bounded memory, as a job meets them.

    PYTHONPATH=. python benchmarks/mutated_pictures.py --pictures 1000 --seed 0

Pictures are decoded one after the other in a process of their own, which is started again if it dies. Prints a line of
JSON: pictures, outcomes by reason, crashes (the process died), hangs (more than HANG_SECONDS of CPU), the peak of the
process's memory above that of a process that has decoded the whole specimens, and the most CPU seconds of one picture.
"""

import argparse
import io
import json
import multiprocessing
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from otprune.families.llava import Square
from pipelines.images.decode import Reject, decode_image

HANG_SECONDS = 5.0  # of CPU
WAIT_SECONDS = 120.0  # longer: a busy machine gives the process little time
GEOMETRY = Square(side=336, num_tokens=576, background=(0, 0, 0), fit="pad")
LIMITS: dict[str, Any] = {"max_bytes": 64 * 2**20, "max_pixels": 100_000_000, "min_side": 2}
LENGTHS = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1", b"\1\0\0\0")


def specimens() -> dict[str, bytes]:
    """A whole picture of each format."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    more = {"save_all": True, "append_images": [image.rotate(90)]}
    return {
        "JPEG": _encode(image, "JPEG", exif=exif, progressive=True),
        "MPO": _encode(image, "MPO", **more),
        "PNG": _encode(image, "PNG", exif=exif),
        "GIF": _encode(image.quantize(32), "GIF", save_all=True, append_images=[image.rotate(90).quantize(32)]),
        "WEBP": _encode(image, "WEBP", exif=exif, **more),
        "BMP": _encode(image, "BMP"),
        "TIFF": _encode(image, "TIFF", compression="tiff_lzw", exif=exif),
        "AVIF": _encode(image, "AVIF", exif=exif),
        "JPEG2000": _encode(image, "JPEG2000"),
    }


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The file after one to three mutations, most of them in its first 400 bytes, where parsers look for structure."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(MUTATIONS)(data, rng) or data
    return data


def _place(data: bytes, rng: random.Random) -> int:
    return rng.randrange(min(len(data), 400) if rng.random() < 0.7 else len(data))


def _change(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[_place(data, rng)] = rng.randrange(256)
    return bytes(changed)


def _set_length(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.choice(LENGTHS) + data[place + 4 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(8, len(data))]


def _remove(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + rng.randint(1, 64) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    """A part again and again, up to 16 MB in all."""
    place, length = _place(data, rng), rng.choice((2, 4, 8, 12, 18, 40))
    part = data[place : place + length]
    return data[:place] + part * rng.choice((2, 100, 10_000, 2**24 // length)) + data[place:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.randbytes(rng.randint(1, 200)) + data[place:]


Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: list[Mutation] = [
    _change,
    _change,
    _set_length,
    _cut,
    _remove,
    _repeat,
    _insert,
]


def decode_all(connection: Connection) -> None:
    """Decodes what comes over the connection until None comes: (reason or "ok", CPU seconds, peak KiB of memory)."""
    for data in specimens().values():
        _outcome(data)
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    while (data := connection.recv_bytes()) != b"end":
        started = time.process_time()
        outcome = _outcome(data)
        connection.send((outcome, time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _outcome(data: bytes) -> str:
    try:
        decode_image(data, geometry=GEOMETRY, more_formats=("avif", "jpeg2000"), **LIMITS)
    except Reject as reject:
        return reject.reason
    except Exception as error:  # decode_image must raise nothing else
        return f"raised {type(error).__name__}"
    return "ok"


class Child:
    """The process that decodes. It is started again after it died or was given up."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=decode_all, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.first_kib: int = self.connection.recv()

    def decode(self, data: bytes) -> tuple[str, float, int]:
        """(outcome, CPU seconds, KiB above those of the whole specimens)."""
        self.connection.send_bytes(data)
        try:
            if not self.connection.poll(WAIT_SECONDS):
                self.process.kill()
                return "hang", WAIT_SECONDS, 0
            outcome, seconds, peak_kib = self.connection.recv()
        except (EOFError, OSError):
            return "crash", 0.0, 0
        return "hang" if seconds > HANG_SECONDS else outcome, seconds, peak_kib - self.first_kib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wholes, child = specimens(), Child()
    outcomes: Counter[str] = Counter()
    worst_seconds, worst_kib, worst = 0.0, 0, ""
    for number in range(options.pictures):
        kind = list(wholes)[number % len(wholes)]
        data = mutate(wholes[kind], random.Random(f"{options.seed}/{number}"))
        outcome, seconds, kib = child.decode(data)
        outcomes[outcome] += 1
        worst_kib = max(worst_kib, kib)
        if seconds > worst_seconds:
            worst_seconds, worst = seconds, f"{kind}, number {number}, {len(data)} bytes: {outcome}"
        if outcome in ("crash", "hang"):
            print(f"{outcome}: {kind}, number {number}, {len(data)} bytes", flush=True)
            child = Child()
    summary = {
        "pictures": options.pictures,
        "formats": len(wholes),
        "seed": options.seed,
        "crashes": outcomes["crash"],
        "hangs": outcomes["hang"],
        "other_exceptions": sum(count for name, count in outcomes.items() if name.startswith("raised")),
        "peak_megabytes_above_start": round(worst_kib / 1024, 1),
        "worst_cpu_seconds": round(worst_seconds, 2),
        "worst": worst,
        "outcomes": dict(outcomes.most_common()),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
