"""A format is one record: one of base64 images, one a line, is planned, read and committed by the job's own code."""

import base64
import hashlib
import json
import pickle
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest

from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.formats import FORMATS
from pipelines.corpus.listing import Listing
from pipelines.errors import UserError
from pipelines.output.plan import Plan, make_plan
from pipelines.output.span import SpanRow
from pipelines.output.unit import split_unit
from pipelines.preflight.canary import sample_spans
from pipelines.stages.unit_batch import UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store, make_store
from tests.helpers import fake_encoder, fake_generator, read_rows
from tests.reading import png, reader_of

FINGERPRINT = "0123456789abcdef"
LINES_A_GROUP = 3


def is_lines(name: str) -> bool:
    return name.endswith(".lines")


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    return Found([index(listing.store, name, listing.sizes[name]) for name in names])


def index(store: Store, name: str, size: int) -> CorpusFile:
    """A reader may start at every third line."""
    lines = store.read(name).splitlines(keepends=True)
    groups = [lines[i : i + LINES_A_GROUP] for i in range(0, len(lines), LINES_A_GROUP)]
    ends = accumulate((len(b"".join(group)) for group in groups), initial=0)
    return CorpusFile(name, size, tuple(map(len, groups)), tuple(ends))


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """One ranged GET."""
    [source], groups = rows.sources, rows.groups
    data = store.fs.cat_file(store.join(source), start=groups.offsets[0], end=groups.offsets[-1])
    for row, line in enumerate(data.splitlines(), groups.start):
        if rows.start <= row < rows.stop:
            yield Record(f"{source}#{row}", source, row, base64.b64decode(line), references=[f"number {row}"])


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    return {row: [f"number {row}"] for row in rows}


LINES = Format(
    name="lines",
    title="lines",
    one_image_a_file=False,
    recognises=is_lines,
    files=find_files,
    records=read_records,
    references=read_references,
)


def write_lines(path: Path, images: Sequence[bytes]) -> None:
    path.write_bytes(b"".join(base64.b64encode(data) + b"\n" for data in images))


def find(path: Path, format: str = "auto") -> Corpus:
    return find_corpus(
        make_store(str(path)),
        image_column="auto",
        id_column="auto",
        reference_column="auto",
        templates=["look"],
        format=format,
        formats=(*FORMATS, LINES),
    )


def plan_of(corpus: Corpus, output: Store, num_images: int, limit: int | None = None) -> Plan:
    return make_plan(corpus, output, FINGERPRINT, num_images=num_images, limit=limit, num_samples=0)


def caption(corpus: Corpus, output: Store, spans: Sequence[SpanRow]) -> None:
    """The job's own reader and sink, in this process; between them stages without models."""
    reader = pickle.loads(pickle.dumps(reader_of(corpus)))  # as it goes to a read task
    sink = Sink(store=output, fingerprint=FINGERPRINT, model="m", method="none")
    encode, generate = fake_encoder()(), fake_generator()()
    for span in spans:
        for row in reader(span.to_row()):
            assert json.loads(sink(generate(encode(row)))["summary"])["error"] is None


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Ten images in two files; one more line is no image."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.lines", [png(i) for i in range(7)])
    write_lines(folder / "b.lines", [png(7), b"no image", png(8), png(9)])
    return find(folder)


def test_a_new_format_is_found_by_its_files_or_by_its_name(corpus: Corpus):
    assert [(file.source, file.row_groups) for file in corpus.files] == [("a.lines", (3, 3, 1)), ("b.lines", (3, 1))]
    assert (corpus.format, corpus.num_rows) == (LINES, 11)
    assert find(Path(corpus.store.path), "lines") == corpus
    with pytest.raises(UserError, match=r"input\.path must hold image files, found 2 others"):
        find(Path(corpus.store.path), "images")
    with pytest.raises(UserError, match=r"input\.format must be one of auto, parquet, images, .*, lines, got 'zip'"):
        find(Path(corpus.store.path), "zip")


@pytest.mark.parametrize("seed", range(4))
def test_a_new_format_is_planned_read_and_committed_row_by_row_once(corpus: Corpus, tmp_path: Path, seed: int):
    rng, output = random.Random(seed), Store(str(tmp_path / "out"))
    spans = plan_of(corpus, output, rng.randint(1, 5), limit=rng.randint(2, 11)).spans
    caption(corpus, output, rng.sample(spans, k=len(spans) // 2))  # a run that was interrupted
    rest = plan_of(corpus, output, rng.randint(1, 5))
    caption(corpus, output, rest.spans)
    rows = read_rows(output)
    images = [*(("a.lines", i, i) for i in range(7)), ("b.lines", 0, 7), ("b.lines", 2, 8), ("b.lines", 3, 9)]
    assert sorted((row["source"], row["row"], row["sha256"]) for row in rows) == [
        (source, row, hashlib.sha256(png(number)).hexdigest()) for source, row, number in images
    ]
    assert {row["id"] for row in rows} == {f"{source}#{row}" for source, row, _ in images}
    [rejected] = read_rows(output, "quarantine")
    assert (rejected["source"], rejected["row"], rejected["reason"]) == ("b.lines", 1, "unsupported_format")
    assert plan_of(corpus, output, 4).spans == []


def test_a_span_in_the_middle_of_a_file_reads_its_own_bytes_alone(corpus: Corpus, tmp_path: Path):
    span = plan_of(corpus, Store(str(tmp_path / "out")), 3).spans[1]
    path = Path(corpus.store.path) / "a.lines"
    offsets = span.row_groups.offsets
    whole = path.read_bytes()
    path.write_bytes(b"?" * offsets[0] + whole[offsets[0] : offsets[-1]] + b"?" * (len(whole) - offsets[-1]))
    [row] = reader_of(corpus)(span.to_row())
    images = UnitBatch.from_row(row).images
    assert [(image.row, image.sha256) for image in images] == [
        (i, hashlib.sha256(png(i)).hexdigest()) for i in (3, 4, 5)
    ]


def test_units_of_a_new_format_split_and_are_sampled_like_all_others(corpus: Corpus, tmp_path: Path):
    span = plan_of(corpus, Store(str(tmp_path / "out")), 3).spans[1]
    singles = split_unit(span.units[0], {file.source: file for file in corpus.files}, FINGERPRINT)
    named = [reader_of(corpus).identify(SpanRow((unit,), span.row_groups, 0)) for unit in singles]
    assert [identity["id"] for identity in named] == ["a.lines#3", "a.lines#4", "a.lines#5"]
    sampled = [row for span in sample_spans(corpus, 4) for row in reader_of(corpus)(span.to_row())]
    assert sum(len(UnitBatch.from_row(row).images) for row in sampled) == 4


def test_names_of_formats_are_told_apart():
    names = [each.name for each in FORMATS]
    assert len(set(names)) == len(names)
    assert "auto" not in names
