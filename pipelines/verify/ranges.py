"""Ranges of rows that overlap: which parts an output does without."""

from collections.abc import Iterator, Sequence


def superfluous(ranges: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Yields the ranges of rows, sorted, without which no row is in two of them: of two that overlap, the shorter."""
    kept = None
    for each in ranges:
        if kept is None or each[0] >= kept[1]:
            kept = each
            continue
        shorter, kept = sorted((kept, each), key=lambda r: r[1] - r[0])
        yield shorter
