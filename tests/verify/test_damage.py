"""Each kind of damage to an output has its line; a repair removes what the job makes anew, and nothing else."""

import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import main
from pipelines.output.lease import Holder, machine
from pipelines.output.plan import make_plan
from pipelines.output.reader import METADATA_KEY
from pipelines.output.unit import Unit, parse_part
from tests.helpers import read_rows, write_corpus
from tests.reading import corpus_at
from tests.verify.outputs import MINE, Output

FOLDERS = ("captions", "quarantine")
REJECTED = (5, 6)  # rows

Spoil = Callable[[Output, str], object]
"""(output, name of the part with rows 4 to 7): does the damage."""


def rewritten(change: Callable[[pa.Table], pa.Table], **metadata: Any) -> Spoil:
    """Other rows, or other metadata."""

    def spoil(output: Output, name: str) -> None:
        table = pq.read_table(io.BytesIO(output.store.read(f"captions/{name}")))
        said = json.loads(table.schema.metadata[METADATA_KEY]) | metadata
        changed = change(table)
        if changed.schema.metadata is not None:
            changed = changed.replace_schema_metadata(table.schema.metadata | {METADATA_KEY: json.dumps(said)})
        pq.write_table(changed, stream := io.BytesIO(), compression="zstd")
        output.store.write(f"captions/{name}", stream.getvalue())

    return spoil


def values(column: str, change: Callable[[list], list], kind: pa.DataType | None = None) -> Spoil:
    """Other values in a column, or of another type."""

    def change_table(table: pa.Table) -> pa.Table:
        field = table.schema.field(column)
        changed = pa.array(change(table[column].to_pylist()), kind or field.type)
        return table.set_column(table.schema.get_field_index(column), column, changed)

    return rewritten(change_table)


def says(**metadata: Any) -> Spoil:
    return rewritten(lambda table: table, **metadata)


def flipped(column: str) -> Spoil:
    """The bytes of a column, turned."""

    def spoil(output: Output, name: str) -> None:
        data = bytearray(output.store.read(f"captions/{name}"))
        group = pq.read_metadata(io.BytesIO(data)).row_group(0)
        chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        for i in range(start, start + chunk.total_compressed_size):
            data[i] ^= 0x5A
        output.store.write(f"captions/{name}", bytes(data))

    return spoil


def cut(folder: str) -> Spoil:
    def spoil(output: Output, name: str) -> None:
        data = output.store.read(f"{folder}/{name}")
        output.store.write(f"{folder}/{name}", data[: len(data) // 2])

    return spoil


def lost(folder: str) -> Spoil:
    return lambda output, name: output.store.delete(f"{folder}/{name}")


def again(start: int, stop: int, *, both: bool = False) -> Spoil:
    """A part with these rows, whole in itself; with `both`, its quarantined rows have captions as well."""

    def spoil(output: Output, name: str) -> None:
        output.commit(Unit(parse_part(name)[0], start, stop, ("a.parquet",)), rejected=REJECTED, both=both)

    return spoil


def copied(target: str) -> Spoil:
    """A copy of the part under another name."""

    def spoil(output: Output, name: str) -> None:
        data = output.store.read(f"captions/{name}")
        output.store.write(f"captions/{target.format(key=parse_part(name)[0])}", data)

    return spoil


@dataclass(frozen=True)
class Damage:
    spoil: Spoil
    line: str  # of the verdict
    removed: str = "004-000000008"  # how the name of the part ends that the repair removes; empty: none


HURT = "(a.parquet, rows 4 to 7)"
OTHER = f"{HURT}: captions holds other values than were written"
DAMAGES = {
    "file cut": Damage(cut("captions"), "is damaged: captions: ArrowInvalid"),
    "file empty": Damage(lambda o, name: o.store.write(f"captions/{name}", b""), "is damaged: captions: ArrowInvalid"),
    "quarantine cut": Damage(cut("quarantine"), "is damaged: quarantine: ArrowInvalid"),
    "caption flipped": Damage(flipped("caption"), "is damaged: captions: OSError"),
    "sha256 flipped": Damage(flipped("sha256"), "is damaged: captions: OSError"),
    "no metadata": Damage(rewritten(lambda t: t.replace_schema_metadata(None)), "is damaged: its metadata: TypeError"),
    "captions null": Damage(
        values("caption", lambda v: [None] * len(v)), f"{HURT}: captions.caption is null in a.parquet row 4 and 3 more"
    ),
    "sha256 null": Damage(
        values("sha256", lambda v: [*v[:-1], None]), f"{HURT}: captions.sha256 is null in a.parquet row 7"
    ),
    "sha256 cut": Damage(
        values("sha256", lambda v: [v[0][:9], *v[1:]]), f"{HURT}: captions.sha256 is no sha256 in a.parquet row 4"
    ),
    "two sha256": Damage(
        values("sha256", lambda v: ["f" * 64, *v[1:]]),
        f"{HURT}: captions has two sha256 of one image in a.parquet row 4",
    ),
    "caption changed": Damage(values("caption", lambda v: ["a dog", *v[1:]]), OTHER),
    "id changed": Damage(values("id", lambda v: ["x", *v[1:]]), OTHER),
    "seconds changed": Damage(says(seconds={"read": 9.0}), OTHER),
    "column lost": Damage(
        rewritten(lambda t: t.drop_columns(["caption"])), f"{HURT}: captions lacks the column caption"
    ),
    "other type": Damage(values("row", list, pa.int32()), f"{HURT}: captions.row must be int64, got int32"),
    "row lost": Damage(rewritten(lambda t: t.slice(2)), "a.parquet row 4: 0 of 2 captions, 0 quarantine rows"),
    "caption lost": Damage(rewritten(lambda t: t.slice(1)), "a.parquet row 4: 1 of 2 captions, 0 quarantine rows"),
    "rows doubled": Damage(
        rewritten(lambda t: pa.concat_tables([t, t])), "a.parquet row 4: 4 of 2 captions, 0 quarantine rows"
    ),
    "quarantine lost": Damage(lost("quarantine"), "a.parquet row 5: 0 of 2 captions, 0 quarantine rows"),
    "row in both": Damage(again(4, 8, both=True), "a.parquet row 5: 2 of 2 captions, 1 quarantine rows"),
    "other file": Damage(
        values("source", lambda v: ["b.parquet"] * len(v)), f"{HURT}: b.parquet row 4 does not belong here"
    ),
    "other counts": Damage(says(prompt_tokens=1), f"{HURT}: its metadata must say prompt_tokens=36, got 1"),
    "other files": Damage(says(sources=["b.parquet"]), f"{HURT}: its metadata must name the files a.parquet"),
    "part lost": Damage(lost("captions"), "a.parquet: rows 4 to 7 have no output"),
    "two boundaries": Damage(again(6, 9), "a.parquet: rows 6 to 7 are in two parts", "006-000000009"),
    "one in another": Damage(again(5, 7), "a.parquet: rows 5 to 6 are in two parts", "005-000000007"),
    "copied over another": Damage(
        copied("part-{key}-000000000-000000004.parquet"),
        "(a.parquet, rows 0 to 3): a.parquet row 0: 0 of 2 captions",
        "000-000000004",
    ),
    "copied beside": Damage(
        copied("part-{key}-000000004-000000008 (1).parquet"), "(1).parquet is not a part of this job", ""
    ),
    "of another corpus": Damage(
        copied("part-00000000000a-000000004-000000008.parquet"), "is of a file that is not in the input", ""
    ),
}


@pytest.mark.parametrize(  # every third in `make test`
    "damage",
    [pytest.param(damage, marks=[pytest.mark.slow] if i % 3 else []) for i, damage in enumerate(DAMAGES.values())],
    ids=DAMAGES,
)
def test_a_damage_has_its_line_and_a_repair_removes_what_the_job_makes_anew(damage: Damage, tmp_path: Path, capsys):
    """And no whole part: after the repair and a resume the output is that of an undisturbed run."""
    corpus = corpus_at(write_corpus(tmp_path / "in" / "a.parquet", [b"x"] * 12, rows_per_group=12))
    output = Output(tmp_path / "out")

    def resume() -> list[str]:
        plan = make_plan(corpus, output.store, MINE, num_images=4, limit=None, num_samples=0)
        return [output.commit(unit, rejected=REJECTED) for unit in plan.units]

    def check(*more: str) -> tuple[int, str]:
        code = main([f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}", *more])
        return code, capsys.readouterr().out

    def listed() -> set[str]:
        return {f"{folder}/{name}" for folder in FOLDERS for name in output.store.list(folder)}

    _, hurt, _ = resume()
    whole, names = [read_rows(output.store, folder) for folder in FOLDERS], listed()
    assert check("repair=true")[0] == 0
    assert listed() == names, "of a whole output nothing is removed"

    damage.spoil(output, hurt)
    spoiled = listed()
    code, text = check()
    assert code == 1
    assert damage.line in text
    assert listed() == spoiled, "nothing is removed unasked"

    code, text = check("repair=true")
    assert code == 1
    expected = {name for name in spoiled if damage.removed and name.endswith(f"{damage.removed}.parquet")}
    assert spoiled - listed() == expected
    told = text.partition("repair: ")[2]
    assert all(name.partition("/")[2] in told for name in expected) if expected else "nothing is removed" in told

    for name in listed() - names if not expected else ():
        output.store.delete(name)  # for the user to decide
    resume()
    assert [read_rows(output.store, folder) for folder in FOLDERS] == whole
    assert check()[0] == 0


def test_nothing_is_repaired_while_a_job_is_at_work(tmp_path: Path, capsys):
    write_corpus(tmp_path / "in" / "a.parquet", [b"x"] * 12)
    output = Output(tmp_path / "out")
    arguments = [f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}"]
    orphan = "quarantine/part-00000000000a-000000004-000000008.parquet"  # or of a unit that is about to be committed
    output.store.write(orphan, b"x")
    holder = Holder("a", "here", machine(), os.getppid(), *["2026-01-01T00:00:00Z"] * 2, 1, 10.0)
    for released in (False, True):
        output.store.write("driver/000001.json", json.dumps(asdict(replace(holder, released=released))).encode())
        assert main([*arguments, "repair=true"]) == (1 if released else 2)
        assert output.store.exists(orphan) != released
    assert "is being written by another driver" in capsys.readouterr().err
