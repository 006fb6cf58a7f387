"""A benchmark as data: its files and columns, how a source row becomes questions, and how answers are scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.benchmarks.columns import Column, check_nulls, check_schema, image_bytes
from pipelines.benchmarks.rows import Content, Record, Row
from pipelines.benchmarks.scoring import Comparison, Scorer, Scores, compare_scores, score_records

Source = dict[str, Any]  # one row of the published Parquet
BATCH_ROWS = 64  # rows that are Python objects at the same time


class Key(NamedTuple):
    """The address of a question: all that a plan of a run or a limit needs."""

    question_id: str
    group_id: str
    image_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTable:
    """A second table that holds the images, looked up by a column of the questions."""

    files: str
    columns: Mapping[str, Column]  # `id` and `image`
    lookup: str  # column of the question table that holds the id of the image


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark. Of the Parquet only `columns` are read; `keys` needs only `key_columns`."""

    name: str
    repo: str  # folder of the data set; the caller knows the folder above
    files: str  # glob below the folder
    columns: Mapping[str, Column]
    key_columns: tuple[str, ...]
    identify: Callable[[Source, int], list[Key]]  # (row, its number in all files) -> its questions; maybe none
    content: Callable[[Source], list[Content]]  # one content for each key
    prompt: Callable[[Row], str]
    max_new_tokens: int
    scorer: Scorer
    image_table: ImageTable | None = None

    def check_schema(self, schema: pa.Schema) -> None:
        """Raises ValueError if columns are missing or of another type. The message names found and expected columns."""
        check_schema(self.name, self.columns, schema)

    def image_lookup(self, table: pa.Table) -> dict[str, bytes]:
        """{image id: encoded bytes} of the second table.

        Raises:
            ValueError: if the schema is wrong, an image is null, or the benchmark has no second table.
        """
        if self.image_table is None:
            raise ValueError(f"benchmark {self.name!r} has its images in its own rows, got a table of images")
        check_schema(self.name, self.image_table.columns, table.schema)
        images = {}
        for source in _python_rows(table, self.image_table.columns):
            try:
                images[source["id"]] = image_bytes(source["image"])
            except ValueError as error:
                raise ValueError(f"benchmark {self.name!r}, image {source['id']!r}: {error}") from error
        return images

    def keys(self, table: pa.Table | pa.RecordBatch, first_row: int = 0) -> list[Key]:
        """Keys of the questions in `table`, which needs only `key_columns`. `first_row` counts over all files."""
        return [key for keys in self.keys_by_row(table, first_row) for key in keys]

    def keys_by_row(self, table: pa.Table | pa.RecordBatch, first_row: int = 0) -> list[list[Key]]:
        """As `keys`, with one list for each row; the list is empty if no question is about the row."""
        rows = _python_rows(table, self.key_columns)
        return [self._keys_of(source, number) for number, source in enumerate(rows, first_row)]

    def rows(
        self, table: pa.Table | pa.RecordBatch, first_row: int = 0, images: Mapping[str, bytes] | None = None
    ) -> Iterator[Row]:
        """The questions in `table`, in order. `images` is the `image_lookup` of the second table, if there is one.

        Raises:
            ValueError: for a null, a missing image or an impossible value. The message names the benchmark and the row.
        """
        self.check_schema(table.schema)
        if (images is None) != (self.image_table is None):
            raise ValueError(
                f"benchmark {self.name!r} must {'' if images is None else 'not '}be given a lookup of images"
            )
        for number, source in enumerate(_python_rows(table, self.columns), first_row):
            keys = self._keys_of(source, number)
            contents = self._contents_of(source, number, images) if keys else []
            for key, content in zip(keys, contents, strict=True):
                yield Row(benchmark=self.name, **key._asdict(), **content)

    def score(self, records: Iterable[Record], *, resamples: int = 1000, seed: int = 0) -> Scores:
        """The scores of all records of a run; see `scoring.score_records`."""
        return score_records(self.name, self.scorer, records, resamples=resamples, seed=seed)

    def compare(self, ours: Scores, theirs: Scores, *, resamples: int = 1000, seed: int = 0) -> Comparison:
        """Compares two runs of this benchmark; see `scoring.compare_scores`."""
        return compare_scores(ours, theirs, self.scorer, resamples=resamples, seed=seed)

    def _keys_of(self, source: Source, number: int) -> list[Key]:
        try:
            check_nulls({name: self.columns[name] for name in self.key_columns}, source)
            return self.identify(source, number)
        except ValueError as error:
            raise ValueError(f"benchmark {self.name!r}, row {number}: {error}") from error

    def _contents_of(self, source: Source, number: int, images: Mapping[str, bytes] | None) -> list[Content]:
        try:
            check_nulls(self.columns, source)
            if self.image_table is not None and images is not None:
                source = {**source, "image": _look_up(source, self.image_table.lookup, images)}
            return self.content(source)
        except ValueError as error:
            raise ValueError(f"benchmark {self.name!r}, row {number}: {error}") from error


def whole_groups(keys: Sequence[Key], limit: int) -> list[int]:
    """Positions in `keys` of at least `limit` questions: those of the first scoring groups, each group complete.

    Later members of a group may stand far behind its first member, as the rotated copies of MMBench do. With fewer than
    `limit` questions in all, the result is all positions.

    Raises:
        ValueError: if limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key.group_id] = sizes.get(key.group_id, 0) + 1
    chosen: set[str] = set()
    num_questions = 0
    for group, size in sizes.items():
        if num_questions >= limit:
            break
        chosen.add(group)
        num_questions += size
    return [i for i, key in enumerate(keys) if key.group_id in chosen]


def one_key(question: str, *, image: str | None = None) -> Callable[[Source, int], list[Key]]:
    """`identify` for rows that hold one question each, its own scoring group. The arguments name the id columns."""

    def identify(source: Source, _: int) -> list[Key]:
        question_id = str(source[question])
        return [Key(question_id, question_id, str(source[image]) if image else question_id)]

    return identify


def _look_up(source: Source, column: str, images: Mapping[str, bytes]) -> dict[str, Any]:
    if source[column] not in images:
        raise ValueError(f"column {column!r} must name one of the {len(images)} images, got {source[column]!r}")
    return {"bytes": images[source[column]], "path": None}


def _python_rows(table: pa.Table | pa.RecordBatch, columns: Iterable[str]) -> Iterator[Source]:
    selected = table.select(list(columns))
    for start in range(0, selected.num_rows, BATCH_ROWS):
        yield from selected.slice(start, BATCH_ROWS).to_pylist()
