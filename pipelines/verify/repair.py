"""Removes what is broken in an output, so that the job that wrote it makes it anew."""

import calendar
import time

from pipelines.errors import UserError
from pipelines.store import Store, read_json
from pipelines.verify.verdict import MAX_SHOWN, Verdict

HEARTBEAT = "heartbeat.json"  # `run.heartbeat.FILE`, whose module loads Ray
ALIVE_SECONDS = 120.0  # age of a heartbeat up to which its job may be at work; it beats every few seconds


def refuse_writers(output: Store) -> None:
    """Refuses to repair while a job is at work: units write their quarantine before the part that commits them.

    Raises:
        UserError: if the heartbeat in the output is that of a running job, and young.
    """
    beat = read_json(output, HEARTBEAT)
    if not isinstance(beat, dict) or beat.get("state") != "running":
        return
    age = time.time() - calendar.timegm(time.strptime(beat["updated"], "%Y-%m-%dT%H:%M:%SZ"))
    if age < ALIVE_SECONDS:
        raise UserError(
            f"repair=true needs an output that no job writes to, got a heartbeat {age:.0f} s ago in {output.path}; "
            f"if that job was killed, try again {ALIVE_SECONDS:.0f} s after its last"
        )


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
