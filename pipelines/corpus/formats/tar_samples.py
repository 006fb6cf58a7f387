"""Reads the samples of a WebDataset shard one after the other, past damage.

A damaged header costs its own member: reading goes on at the next block of the file that is a header. A damaged gzip
stream costs what follows. Members that end a sample or belong to none are counted, so that nothing is lost in silence.
"""

import contextlib
import gzip
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, cast

from pipelines.corpus.ranged import open_range
from pipelines.corpus.suffixes import is_image
from pipelines.images.decode import Reject
from pipelines.store import Store

BLOCK = 512  # bytes; headers begin at multiples of it
SCAN_BYTES = 2**20  # read at a time in search of the next header
MAX_TEXT_BYTES = 2**20
TEXT_SUFFIXES = ("txt", "text", "json", "cls", "cap", "caption", "captions", "url", "title", "alt", "id", "key", "lang")
META = re.compile(r"__[^/]*__($|/)")  # what the webdataset library leaves out
ENDS = (EOFError, zlib.error, gzip.BadGzipFile)  # of a compressed stream that is cut or damaged

DAMAGED = "damaged stretches of tar files"
CUT = "compressed tar files that are cut or damaged"
NO_SAMPLE = "members of tar files that belong to no sample"
LINKS = "links and other special members of tar files"
FURTHER = "further images of a sample (input.image_column chooses)"
NO_IMAGE = "samples without an image"


@dataclass(slots=True)
class Sample:
    """Consecutive members of one key."""

    key: str
    offset: int  # byte at which its first member begins, extended headers included
    image: str | None = None  # suffix of its image
    data: bytes | Reject | None = None  # of the image, if it was asked for
    texts: dict[str, bytes] = field(default_factory=dict)  # content of its members of text by suffix
    suffixes: set[str] = field(default_factory=set)

    def columns(self) -> dict[str, Any]:
        """The entries of its `.json` member, and each member of text under its suffix."""
        texts = {suffix: data.decode(errors="replace") for suffix, data in self.texts.items()}
        entries: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            entries = json.loads(texts.get("json", "null"))
        return (entries if isinstance(entries, dict) else {}) | texts


@contextlib.contextmanager
def open_shard(store: Store, name: str, start: int, stop: int) -> Iterator[tuple[IO[bytes], float]]:
    """A stream of a shard that stands at the byte `start`, and where in the stream its byte `stop` is."""
    if is_compressed(name):
        packed = cast(IO[bytes], store.fs.open(store.join(name), "rb", block_size=2**23))
        with packed, gzip.GzipFile(fileobj=packed) as stream:
            yield cast(IO[bytes], stream), float("inf")  # a compressed shard is read from its beginning to its end
    else:
        with open_range(store, name, start, stop) as stream:
            yield stream, stop


def is_compressed(name: str) -> bool:
    """Whether a shard has to be read from its beginning."""
    return not name.lower().endswith(".tar")


def read_samples(
    stream: IO[bytes],
    stop: float,
    image: str,
    max_bytes: int | None = None,
    *,
    wants_text: bool = False,
    left_out: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Yields the samples that begin before the byte `stop`, also those without an image.

    Args:
        image: suffix of the image, or auto: a plain suffix of an image format (`jpg`) before a longer one (`seg.png`).
        max_bytes: images up to this size are read, larger ones become a `Reject`; None reads no image.
        left_out: counts what belongs to no sample, by reason.
    """
    left_out = Counter() if left_out is None else left_out
    sample: Sample | None = None
    for archive, member in _members(stream, stop, left_out):
        if not member.isreg():
            left_out[LINKS] += not member.isdir()
            continue
        key, suffix = split_name(member.name)
        if not key:
            left_out[NO_SAMPLE] += 1
            continue
        if sample is None or sample.key != key or suffix in sample.suffixes:
            if sample is not None:
                yield sample
            sample = Sample(key, member.offset)
        sample.suffixes.add(suffix)
        if _rank(suffix, image) is not None:
            _take_image(sample, suffix, image, left_out, lambda: _read(archive, member, max_bytes))  # noqa: B023
        elif wants_text and suffix.rpartition(".")[2] in TEXT_SUFFIXES and member.size <= MAX_TEXT_BYTES:
            content = _read(archive, member, MAX_TEXT_BYTES)
            if isinstance(content, bytes):
                sample.texts[suffix] = content
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str]:
    """The key and the suffix of a member, as the webdataset library has them; both empty if it belongs to no sample."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or META.match(name):
        return "", ""
    return folder + slash + stem, suffix.lower()


def _take_image(sample: Sample, suffix: str, image: str, left_out: Counter[str], read: Any) -> None:
    """Makes a member the image of its sample, unless the sample has a better one."""
    if sample.image is not None:
        left_out[FURTHER] += 1
        if (_rank(suffix, image) or 0) >= (_rank(sample.image, image) or 0):
            return
    sample.image, sample.data = suffix, read()


def _rank(suffix: str, image: str) -> int | None:
    """How good a member is as the image of its sample, 0 best; None if it is none."""
    if image != "auto":
        return 0 if suffix == image.lower() else None
    return suffix.count(".") if is_image(f".{suffix}") else None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int | None) -> bytes | Reject | None:
    if max_bytes is None:
        return None
    if member.size > max_bytes:
        return Reject("too_large_bytes", f"{member.size} bytes")
    stream = archive.extractfile(member)
    assert stream is not None
    try:
        data = stream.read()
    except (tarfile.TarError, *ENDS) as error:
        return Reject("truncated", f"{member.name}: the tar file ends before the image does ({error})")
    return data if len(data) == member.size else Reject("truncated", f"{len(data)} of {member.size} bytes")


def _members(
    stream: IO[bytes], stop: float, left_out: Counter[str]
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the members that begin before `stop`, with the archive that reads their content."""
    position: int | None = stream.tell()
    try:
        while position is not None and position < stop:
            archive = None
            with contextlib.suppress(tarfile.TarError, ValueError):  # ValueError: numbers of an extended header
                stream.seek(position)
                archive = tarfile.TarFile(fileobj=stream, mode="r", errors="surrogateescape")
                while (member := archive.next()) is not None:
                    cast(Any, archive).members.clear()  # else the list of all members grows
                    if member.offset >= stop:
                        return
                    yield archive, member
                    position = archive.offset
            failed = position if archive is None else max(position, archive.offset)
            position = _next_header(stream, failed, stop, left_out)
            if position == failed:  # its checksum is right, and yet it is no header that can be read
                left_out[DAMAGED] += 1
                position = _next_header(stream, failed + BLOCK, stop, left_out)
    except ENDS:
        left_out[CUT] += 1


def _next_header(stream: IO[bytes], position: int, stop: float, left_out: Counter[str]) -> int | None:
    """The next block that is the header of a member; None if there is none before `stop`.

    Zeros end an archive, and another may follow it. Anything else between two headers is damage.
    """
    stream.seek(position)
    is_damaged = False
    try:
        while position < stop and (data := stream.read(SCAN_BYTES)):
            for begin in range(0, len(data), BLOCK):
                block = data[begin : begin + BLOCK]
                if not any(block):
                    continue
                if _is_header(block):
                    return position + begin
                is_damaged = True
            position += len(data)
        return None
    finally:
        left_out[DAMAGED] += is_damaged


def _is_header(block: bytes) -> bool:
    """Whether a block has the mark of a header and its checksum: the sum of its bytes with the checksum as spaces."""
    if block[257:262] != b"ustar" or len(block) < BLOCK:
        return False
    with contextlib.suppress(ValueError):
        return int(block[148:156].strip(b"\0 ") or b"0", 8) == sum(block) - sum(block[148:156]) + 8 * 32
    return False
