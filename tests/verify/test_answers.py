"""The output of an evaluation that is right is proven so, and each way to be wrong is found.

Two scenes, a question of each of two tasks about every one; written without a cluster.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.corpus import SCHEMA
from jobs.verify import main
from pipelines.accuracy.read_questions import prediction_rows
from pipelines.accuracy.schema import PREDICTIONS
from pipelines.corpus.file import CorpusFile
from pipelines.output.fingerprint import FILE, fingerprint
from pipelines.output.unit import Unit, unit_key
from pipelines.stages.unit_batch import Answer, Image, Question, QuestionSet, Rejected, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store
from tests.conftest import scene_row
from tests.helpers import question

DONE = Answer("red", num_kept_tokens=5, num_prompt_tokens=9, num_generated_tokens=3, finish_reason="stop")


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    def run(*more: str) -> tuple[int, str]:
        code = main([f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}", *more])
        return code, capsys.readouterr().out

    return run


class Evaluated:
    """Predictions of which every detail can be got wrong."""

    def __init__(self, folder: Path, pngs: list[bytes]):
        asked = [{"task": task, "question": "what ?", "answer": "red"} for task in ("attr", "bg")]
        rows = [{**scene_row(i, png), "questions": asked} for i, png in enumerate(pngs)]
        (folder / "in").mkdir()
        file = folder / "in" / "scenes-0.parquet"
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)
        claim = {"benchmarks": ["demo_attr", "demo_bg"], "limit": None}
        self.store, self.claim = Store(str(folder / "out")), fingerprint(claim)
        self.store.write(FILE, json.dumps(claim).encode())
        key = unit_key([CorpusFile(file.name, file.stat().st_size, (len(rows),))], self.claim)
        self.unit = Unit(key, 0, len(rows), (file.name,))
        self.records = [
            question(
                benchmark=f"demo_{task}",
                question_id=f"{row['id']}#{task}-0",
                image_id=row["id"],
                source=file.name,
                row=i,
            )
            for i, row in enumerate(rows)
            for task in ("attr", "bg")
        ]

    def commit(self, records: list[Question], rejected: tuple[int, ...] = ()) -> str:
        unit_batch, source = UnitBatch(self.unit), self.unit.sources[0]
        for i in range(self.unit.num_images):
            mine = [record for record in records if record.row == i]
            where = {"id": f"scene-{i:07d}", "source": source, "row": i, "sha256": ""}
            if i in rejected:
                unit_batch.rejected.append(Rejected(**where, reason="missing", detail="", questions=mine))
            else:
                image = Image(
                    **where, prompts=["what ?"] * len(mine), answers=[DONE] * len(mine), question_set=QuestionSet(mine)
                )
                unit_batch.images.append(image)
        Sink(
            store=self.store, fingerprint=self.claim, model="m", method="none",
            folder="predictions", schema=PREDICTIONS, rows=prediction_rows,
        ).commit(unit_batch)  # fmt: skip
        return f"part-{self.unit.name}.parquet"


@pytest.fixture
def evaluated(tmp_path: Path, scene_png: Callable[[int], bytes]) -> Evaluated:
    return Evaluated(tmp_path, [scene_png(0), scene_png(1)])


def test_an_evaluation_is_proven_question_by_question(evaluated: Evaluated, check):
    evaluated.commit(evaluated.records)
    code, text = check()
    assert code == 0
    assert "4 questions" in text
    assert "4 questions about 2 images in 1 parts" in text
    assert "the output holds every question once" in text


def test_questions_about_an_image_in_quarantine_are_accounted_for(evaluated: Evaluated, check):
    name = evaluated.commit(evaluated.records, rejected=(1,))
    code, text = check()
    assert code == 0
    assert "2 questions about 1 images (missing 1) in quarantine" in text
    evaluated.store.delete(f"quarantine/{name}")
    code, text = check()
    assert code == 1
    assert "has no answer, yet its image is not in quarantine" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda records: records[:-1], "scene-0000001#bg-0 (scenes-0.parquet row 1) has no prediction"),
        (lambda records: [*records, records[0]], "scene-0000000#attr-0 (scenes-0.parquet row 0) has 2 predictions"),
        (
            lambda records: [*records[:-1], replace(records[-1], question_id="x")],
            "demo_bg x (scenes-0.parquet row 1) was",
        ),
        (lambda records: [*records[:-1], replace(records[-1], source="y")], "does not belong into"),
    ],
)
def test_wrong_predictions_are_found(change: Callable, says: str, evaluated: Evaluated, check):
    evaluated.commit(change(evaluated.records))
    code, text = check()
    assert code == 1
    assert says in text
    name = f"part-{evaluated.unit.name}.parquet"
    assert f"predictions/{name} (scenes-0.parquet, rows 0 to 1)" in check("repair=true")[1].partition("repair: ")[2]
    assert not evaluated.store.exists(f"predictions/{name}"), "the job asks its questions again"


def test_a_lost_or_damaged_object_of_an_evaluation_is_found(evaluated: Evaluated, check):
    name = evaluated.commit(evaluated.records)
    evaluated.store.write(f"predictions/{name}", b"no parquet")
    code, text = check()
    assert code == 1
    assert f"{name} is damaged" in text
    evaluated.store.delete(f"predictions/{name}")
    assert "4 differences" in check()[1]
