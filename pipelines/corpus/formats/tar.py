"""The format of WebDataset shards: tar files whose consecutive members of one key are one sample.

The key of a member is its name up to the first dot of the base name, and its suffix is the rest: `a/001.seg.png` has
the key `a/001` and the suffix `seg.png`. A sample with an image is a row, and its key is the row's id. Members of text
(`.txt`, `.json`, `.cls`, ...) are columns under their suffix, and so is every entry of a `.json` member.

A shard is read once to be planned (tar_index.py). After that a work unit is a ranged read of its own bytes, in which
the members' headers say the rest. A compressed shard has one place to start reading, which is its beginning.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.corpus.columns import REFERENCE_NAMES, ColumnChoice, Columns, template_fields
from pipelines.corpus.file import CorpusFile, ReadRange, covering
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.formats.rows import as_list, id_of
from pipelines.corpus.formats.tar_index import index_shards
from pipelines.corpus.formats.tar_samples import Sample, open_shard, read_samples
from pipelines.corpus.listing import Listing
from pipelines.errors import UserError
from pipelines.store import Store

SUFFIXES = (".tar", ".tar.gz", ".tgz")
KEY = "__key__"  # the id column that is a sample's key
PEEKED_SAMPLES = 16  # whose columns a prompt may use


def is_tar(name: str) -> bool:
    """Whether a file's name ends in the suffix of a tar file that can be read here."""
    return name.lower().endswith(SUFFIXES)


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The shards that have images, with the places at which a reader may start, and the columns to read.

    Raises:
        UserError: if a shard is no tar file, there is no image, or a column is unknown.
    """
    indices = index_shards(listing, names, choice.image)
    files, left_out = [], {}
    for name, index in zip(names, indices, strict=True):
        if index.rows:
            tag = listing.versions.get(name, "")
            files.append(CorpusFile(name, listing.sizes[name], index.rows, index.offsets, tag))
        for reason, count in index.note.items():
            left_out[reason] = left_out.get(reason, 0) + count
    if not files:
        what = "images" if choice.image == "auto" else f"members .{choice.image} (input.image_column)"
        counts = "".join(f", {count} {reason}" for reason, count in left_out.items())
        raise UserError(f"input.path must hold {what}, found none in {len(names)} tar files{counts}")
    if empty := len(names) - len(files):
        left_out["tar files without images"] = empty
    return Found(files, _columns(listing.store, files[0], choice), left_out)


def _columns(store: Store, file: CorpusFile, choice: ColumnChoice) -> Columns:
    """The columns of a corpus of shards, resolved against the first samples of a shard.

    Raises:
        UserError: if a prompt or a key uses a column that none of them has.
    """
    stop = min(PEEKED_SAMPLES, file.num_rows)
    [groups] = covering(file, [(0, stop)])
    everything = Columns(choice.image, "binary", KEY, None, ())
    rows = ReadRange((file.source,), 0, stop, groups)
    samples = _samples(store, rows, everything, max_bytes=0, wants_text=True)
    known = {name: value for _, sample in samples for name, value in sample.columns().items()}
    texts = [name for name, value in known.items() if isinstance(value, str) or _is_texts(value)]
    fields = tuple(dict.fromkeys(name for template in choice.templates for name in template_fields(template)))
    has = ", ".join([KEY, *known])
    if unknown := [name for name in fields if name not in known and name != KEY]:
        raise UserError(f"prompt.template uses the column {unknown[0]!r}; the samples have {has}")
    id_column = KEY if choice.id == "auto" else choice.id
    if id_column not in ("none", KEY, *known):
        raise UserError(f"input.id_column must be none, auto or one of {has}, got {choice.id}")
    references = choice.references
    if references == "auto":
        references = next((name for name in (*REFERENCE_NAMES, "txt") if name in texts), "none")
    elif references not in ("none", *texts):
        raise UserError(f"input.reference_column must be none, auto or one of {', '.join(texts)}, got {references}")
    return Columns(
        image=choice.image,
        kind="binary",
        id=None if id_column == "none" else id_column,
        references=None if references == "none" else references,
        fields=fields,
    )


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each sample with an image. Memory holds one image."""
    assert columns is not None
    source = rows.sources[0]
    wants_text = bool(columns.fields) or columns.id not in (None, KEY) or (with_references and columns.references)
    for row, sample in _samples(store, rows, columns, max_bytes=max_bytes, wants_text=bool(wants_text)):
        values = sample.columns() if wants_text else {}
        values[KEY] = sample.key
        yield Record(
            id=id_of(values.get(columns.id) if columns.id else None, f"{source}#{row}"),
            source=source,
            row=row,
            data=sample.data,
            fields={name: values.get(name) for name in columns.fields},
            references=as_list(values.get(columns.references)) if with_references and columns.references else [],
        )


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    if columns is None or columns.references is None:
        return {}
    wanted, references = set(rows), {}
    [groups] = covering(file, [(min(rows), max(rows) + 1)]) if rows else [None]
    if groups is None:
        return {}
    span = ReadRange((file.source,), min(rows), max(rows) + 1, groups)
    for row, sample in _samples(store, span, columns, max_bytes=0, wants_text=True):
        if row in wanted and (texts := [text for text in as_list(sample.columns().get(columns.references)) if text]):
            references[row] = texts
    return references


def _samples(
    store: Store, rows: ReadRange, columns: Columns, *, max_bytes: int, wants_text: bool
) -> Iterator[tuple[int, Sample]]:
    """Yields (row, sample) for a range of rows, from one ranged read."""
    row = rows.groups.start
    with open_shard(store, rows.sources[0], rows.groups.offsets[0], rows.groups.offsets[-1]) as (stream, stop):
        for sample in read_samples(stream, stop, columns.image, max_bytes, wants_text=wants_text):
            if sample.image is None:
                continue
            if rows.start <= row:
                yield row, sample
            row += 1
            if row >= rows.stop:
                return


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


FORMAT = Format(
    name="tar",
    title="tar",
    one_image_a_file=False,
    recognises=is_tar,
    files=find_files,
    records=read_records,
    references=read_references,
)
