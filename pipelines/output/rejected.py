"""Stops a run whose images are mostly quarantined.

The fault is then in the corpus or in the keys, and every further hour costs dollars for nothing.
"""

from collections.abc import Iterable
from typing import Any

from pipelines.output.reader import DamagedPart, OutputReader
from pipelines.output.totals import Totals

MIN_JUDGED = 256  # images of a run before its share of quarantined ones says something
MIN_NOTHING = 8  # images of a whole corpus of which none was captioned; fewer may all be bad by chance


def too_many_rejected(totals: Totals, max_rejected: float, *, is_done: bool) -> str:
    """Why a run ends because of its quarantined images; empty if it may go on.

    A run that is done fails only if it captioned nothing at all, of MIN_NOTHING images or more.

    Args:
        totals: of this run so far.
        max_rejected: largest share of quarantined images; 1 allows all.
        is_done: whether nothing is left to do, and no earlier run has captioned anything.
    """
    share = totals.images_quarantined / max(1, totals.images)
    nothing = is_done and not totals.images_captioned and totals.images >= MIN_NOTHING
    judged = totals.images >= MIN_JUDGED or nothing
    if max_rejected >= 1 or share <= max_rejected or not judged:
        return ""
    [(reason, count)] = totals.reasons.most_common(1)
    return (
        f"{totals.images_quarantined} of {totals.images} images are quarantined, more than faults.max_rejected="
        f"{max_rejected:g}; {count} of them with the reason {reason}"
    )


def example_of(reader: OutputReader, names: Iterable[str], reason: str) -> str:
    """One image of the parts that is quarantined for the reason, as text for a message; empty if there is none."""
    for part in reader.parts([], ["source", "row", "reason", "detail"], names):
        rows: list[dict[str, Any]] = []
        if not isinstance(part, DamagedPart) and part.quarantine is not None:
            rows = part.quarantine.to_pylist()
        for row in rows:
            if row["reason"] == reason:
                return f", for example {row['source']} row {row['row']}: {row['detail']}"
    return ""
