"""First stage of an evaluation, a CPU task: a span of units -> one row per unit with questions and decoded images.

A unit is a range of rows of one file, as in the caption job. Questions about the same image (18 in POPE, 32 in GQA, 9
in the demo) share one `Image` of the unit, which is decoded and encoded once. If an image cannot be decoded, its
`Rejected` keeps the questions, so that each of them is scored as an empty answer.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmarks import Benchmark, Row, get_benchmark
from pipelines.corpus.formats.parquet import row_batches
from pipelines.images.decode import Picture, Reject
from pipelines.output.span import SpanRow
from pipelines.stages.read import DecodeSettings, fill_units, flat_pixels
from pipelines.stages.unit_batch import Image, Question, QuestionSet, Rejected, UnitBatch
from pipelines.store import Store
from pipelines.text import clean


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """How to read one file of questions."""

    benchmarks: tuple[str, ...]  # names of the benchmarks with questions about the file's rows
    first_row: int  # number of rows in the benchmark's earlier files
    image_files: tuple[str, ...] = ()  # files of the second table, if the benchmark keeps its images there


class ReadQuestions:
    """Reads the questions of a span and decodes their images, one unit at a time.

    `wanted` holds the scoring groups to ask, for each benchmark with a limit. `max_new_tokens` caps the numbers of new
    tokens that the benchmarks allow.
    """

    def __init__(
        self,
        *,
        store: Store,
        files: Mapping[str, QuestionFile],
        wanted: Mapping[str, frozenset[str]],
        decode: DecodeSettings,
        max_new_tokens: int,
    ):
        self.store, self.files, self.wanted, self.decode = store, files, wanted, decode
        self.max_new_tokens = max_new_tokens

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        span = SpanRow.from_row(row)
        rows = self._rows(span)
        yield from fill_units(span, lambda unit_batch: self._fill(unit_batch, rows))

    def identify(self, span: SpanRow) -> dict[str, Any]:
        """id, source, row, sha256 and questions of a span of one row. Does not decode the image."""
        source = span.units[0].sources[0]
        number, batch = next(self._rows(span))
        identity = {"id": f"{source}#{number}", "source": source, "row": number, "sha256": None, "questions": []}
        for bench, content in self._questions_about(source, number, batch):
            data = b"".join(content["images"])
            identity |= {"id": content["image_id"], "sha256": hashlib.sha256(data).hexdigest()}
            identity["questions"].append(self._question(bench, content, source, number))
        return identity

    def _fill(self, unit_batch: UnitBatch, rows: Iterator[tuple[int, pa.RecordBatch]]) -> None:
        source = unit_batch.unit.sources[0]
        with unit_batch.timed("read"):
            wanted = itertools.dropwhile(lambda row: row[0] < unit_batch.unit.start, rows)  # rows done before
            unit_rows = list(itertools.islice(wanted, unit_batch.unit.num_images))
        if len(unit_rows) != unit_batch.unit.num_images:
            raise ValueError(
                f"expected {unit_batch.unit.num_images} rows in {unit_batch.unit.name}, got {len(unit_rows)}"
            )
        images: dict[str, Image | Rejected] = {}
        # Image id -> its questions. The image holds the same list, so a question appended here reaches the image.
        questions: dict[str, list[Question]] = {}
        pictures: list[Picture] = []
        with unit_batch.timed("decode"):
            for number, batch in unit_rows:
                for bench, content in self._questions_about(source, number, batch):
                    key = content["image_id"]
                    if key not in images:
                        questions[key] = []
                        images[key] = self._decode(content, source, number, questions[key], pictures)
                    questions[key].append(self._question(bench, content, source, number))
            unit_batch.arrays = {"pixels": flat_pixels(pictures)}
        unit_batch.images = [image for image in images.values() if isinstance(image, Image)]
        unit_batch.rejected = [image for image in images.values() if isinstance(image, Rejected)]
        for image in unit_batch.images:
            image.prompts = [question.prompt for question in image.questions]

    def _decode(
        self, content: Row, source: str, number: int, questions: list[Question], pictures: list[Picture]
    ) -> Image | Rejected:
        """Decodes the image (several of MMMU count as one), adds it to `pictures`, and hands it `questions`."""
        sha256 = hashlib.sha256(b"".join(content["images"])).hexdigest()
        where = {"id": content["image_id"], "source": source, "row": number, "sha256": sha256}
        try:
            decoded = [self.decode(data) for data in content["images"]]
        except Reject as reject:
            return Rejected(**where, reason=reject.reason, detail=clean(reject.detail), questions=questions)
        pictures += decoded
        sizes = [picture.size for picture in decoded]
        return Image(**where, prompts=[], sizes=sizes, question_set=QuestionSet(questions, num_pictures=len(sizes)))

    def _question(self, bench: Benchmark, content: Row, source: str, number: int) -> Question:
        """The question in row `number` of a file, without its images, which the unit holds as pixels."""
        fields: dict[str, Any] = {name: value for name, value in content.items() if name != "images"}
        limit = min(bench.max_new_tokens, self.max_new_tokens)
        return Question(**fields, prompt=bench.prompt(content), source=source, row=number, max_new_tokens=limit)

    def _questions_about(self, source: str, number: int, batch: pa.RecordBatch) -> Iterator[tuple[Benchmark, Row]]:
        """The questions of `batch`, which is row `number` of the file: benchmark by benchmark, with their images."""
        file = self.files[source]
        for name in file.benchmarks:
            bench = get_benchmark(name)
            images = load_images(self.store, name, file.image_files) if file.image_files else None
            for question in bench.rows(batch, file.first_row + number, images):
                if name not in self.wanted or question["group_id"] in self.wanted[name]:
                    yield bench, question

    def _rows(self, span: SpanRow) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of the span as batches of one row, each with its number in the file."""
        benches = [get_benchmark(name) for name in self.files[span.units[0].sources[0]].benchmarks]
        columns = list(dict.fromkeys(column for bench in benches for column in bench.columns))
        for row, batch in row_batches(self.store, span.rows, columns):
            yield from ((row + i, batch.slice(i, 1)) for i in range(batch.num_rows))


@lru_cache(maxsize=1)
def load_images(store: Store, benchmark: str, files: tuple[str, ...]) -> dict[str, bytes]:
    """Encoded images of a benchmark's second table, by id. Each reading process caches one table (66 MB for GQA)."""
    bench = get_benchmark(benchmark)
    assert bench.image_table is not None
    images: dict[str, bytes] = {}
    for file in files:
        with store.fs.open(store.join(file), "rb") as stream:
            images |= bench.image_lookup(pq.read_table(stream, columns=list(bench.image_table.columns)))
    return images


def prediction_rows(unit_batch: UnitBatch, *, model: str, method: str) -> list[dict[str, Any]]:
    """One row for each question of a unit, in the columns of `PREDICTIONS`.

    The prediction and the counts of tokens are null if the image was rejected.
    """
    names = {"model": model, "method": method}
    answered = [
        {**_columns(question), **asdict(answer), **names, "prediction": answer.caption, "sha256": image.sha256}
        | {"num_visual_tokens": image.num_visual_tokens}
        for image in unit_batch.images
        for question, answer in zip(image.questions, image.answers, strict=True)
    ]
    return answered + [
        {**_columns(question), **names, "prediction": None, "sha256": rejected.sha256}
        for rejected in unit_batch.rejected
        for question in rejected.questions
    ]


def _columns(question: Question) -> dict[str, Any]:
    """The columns of a question in the predictions: all its fields but the limit of new tokens."""
    columns = asdict(question)
    del columns["max_new_tokens"]
    return columns
