"""Removes what is broken in an output, so that the job that wrote it makes it anew."""

from pipelines.store import Store
from pipelines.verify.verdict import MAX_SHOWN, Verdict


def repair(output: Store, folder: str, verdict: Verdict) -> list[str]:
    """Removes the broken parts of `folder` and the quarantine that belongs to no part; returns lines for people.

    Removes nothing but parts whose rows the job then finds to be left to do: no whole part, and no file that is not of
    the job. Of each part the captions go first: a row that is in quarantine alone counts as left to do.
    """
    for name in verdict.broken:
        output.delete(f"{folder}/{name}")
        output.delete(f"quarantine/{name}")
    for name in verdict.orphans:
        output.delete(f"quarantine/{name}")
    removed = [f"{folder}/{name} ({where})" for name, where in sorted(verdict.broken.items())]
    removed += [f"quarantine/{name}" for name in verdict.orphans]
    if not removed:
        return ["repair: nothing that running the job again would make anew; nothing is removed"]
    more = [f"  and {len(removed) - MAX_SHOWN:,} others"] if len(removed) > MAX_SHOWN else []
    head = f"repair: removed {len(removed):,} parts, which the job makes anew when it is run again with its keys"
    return [head, *(f"  {line}" for line in removed[:MAX_SHOWN]), *more]
