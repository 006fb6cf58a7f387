"""Checks the directories of TIFF files before a parser believes them: a parser makes an object of every value.

A value of a few bytes costs a parser a hundred, and a fraction some microseconds, so that a file within the limits of
bytes and pixels could cost a minute and gigabytes.
"""

import struct
from collections.abc import Iterator

MAX_ENTRIES = 4096  # of a directory; cameras write about a hundred
MAX_VALUES = (
    100_000  # numbers of all entries that a parser reads together; a strip for each of 40,000 rows takes 80,000
)
BYTES_OF = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TEXTS = (1, 2, 6, 7)  # types whose values stay together
INNER = (34665, 34853, 40965)  # entries that hold the place of a directory which parsers read: EXIF, GPS, and in EXIF
PRIVATE = 32768  # entries from here on are read by those who know them


def check_directories(data: bytes) -> str | None:
    """Why the directories of the first picture would cost too much; None if they do not."""
    big = b"+" in data[2:4]
    order = "<" if data.startswith(b"II") else ">"
    first = _number(data, f"{order}{'Q' if big else 'I'}", 8 if big else 4)
    waiting, seen, values, num_bytes = [first], set[int](), 0, 0
    while waiting:
        start = waiting.pop()
        if start in seen or len(seen) > len(INNER):
            continue
        seen.add(start)
        entries = list(_entries(data, start, order, big))
        if len(entries) > MAX_ENTRIES:
            return f"more than {MAX_ENTRIES} entries in a directory"
        for tag, kind, count, place in entries:
            num_bytes += count * BYTES_OF.get(kind, 0)
            if kind not in TEXTS and (start != first or tag < PRIVATE):
                values += count
            if tag in INNER and count == 1:
                waiting.append(place)
    if values > MAX_VALUES:
        return f"more than {MAX_VALUES} values in its directories"
    return "values that overlap" if num_bytes > 2 * len(data) + 2**20 else None


def _entries(data: bytes, start: int, order: str, big: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yields (tag, type, number of values, value or its place); at most one entry more than may be."""
    head, form, step = ("Q", "HHQQ", 20) if big else ("H", "HHII", 12)
    position = start + struct.calcsize(f"{order}{head}")
    for _ in range(min(_number(data, f"{order}{head}", start), MAX_ENTRIES + 1)):
        if position + step > len(data):
            return
        yield struct.unpack_from(f"{order}{form}", data, position)
        position += step


def _number(data: bytes, form: str, position: int) -> int:
    return struct.unpack_from(form, data, position)[0] if position + struct.calcsize(form) <= len(data) else 0
