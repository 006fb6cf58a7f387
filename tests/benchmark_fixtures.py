"""Tiny Parquet files in every benchmark's published schema and folder layout, with made-up content.

    python tests/benchmark_fixtures.py FOLDER

`write_fixtures(folder)` gives FOLDER/<repo>/<files> for each; the demo world's rows lie in the folder itself.
"""

import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from demo.corpus import SCHEMA as DEMO_SCHEMA

TEXT, TEXTS, IMAGE = pa.string(), pa.list_(pa.string()), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "white": (240, 240, 240)}


def picture(color: str = "red", side: int = 48) -> dict:
    """One Image value: a PNG of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), COLORS[color]).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{color}.png"}


def table(fields: dict[str, pa.DataType], rows: list[dict]) -> pa.Table:
    """Rows as a table; a column that a row does not name is empty there."""
    fillers = {TEXT: "", TEXTS: [], pa.int8(): 0, pa.int16(): 0, pa.int32(): 0, pa.int64(): 0, pa.bool_(): True}
    filled = [{name: row.get(name, fillers.get(kind)) for name, kind in fields.items()} for row in rows]
    return pa.Table.from_pylist(filled, pa.schema(list(fields.items())))


def coco() -> dict[str, pa.Table]:
    fields = {
        "question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXTS, "id": pa.int64(), "license": pa.int8(),
        "file_name": TEXT, "coco_url": TEXT, "height": pa.int32(), "width": pa.int32(), "date_captured": TEXT,
    }  # fmt: skip
    captions = [
        (
            "000000000139.jpg",
            ["A red bus on a street.", "A bus is red.", "The red bus drives.", "Bus on the street", "A bus"],
        ),
        (
            "000000000285.jpg",
            ["Two dogs play\nball.", "Dogs with a ball.", "A pair of dogs.", "Dogs play", "Two dogs run"],
        ),
        ("000000000632.jpg", ["A cat on a mat."] + [f"The cat sleeps there {i}." for i in range(6)]),
    ]
    rows = [{"question_id": name, "image": picture(), "answer": texts, "file_name": name} for name, texts in captions]
    return {
        "data/val-00000-of-00002.parquet": table(fields, rows[:2]),
        "data/val-00001-of-00002.parquet": table(fields, rows[2:]),
    }


def flickr30k() -> dict[str, pa.Table]:
    fields = {"image": IMAGE, "caption": TEXTS, "sentids": TEXTS, "img_id": TEXT, "filename": TEXT}
    rows = [
        {"image": picture(color), "caption": [f"A {color} wall number {i} ." for i in range(5)], "img_id": str(n)}
        for n, color in enumerate(COLORS)
    ]
    return {"data/test-00000-of-00009.parquet": table(fields, rows)}


def nocaps() -> dict[str, pa.Table]:
    fields = {
        "image": IMAGE, "image_coco_url": TEXT, "image_date_captured": TEXT, "image_file_name": TEXT,
        "image_height": pa.int32(), "image_width": pa.int32(), "image_id": pa.int32(), "image_license": pa.int8(),
        "image_open_images_id": TEXT, "annotations_ids": pa.list_(pa.int32()), "annotations_captions": TEXTS,
    }  # fmt: skip
    rows = [
        {
            "image": picture(color),
            "image_id": n,
            "annotations_captions": [f"{color} thing seen {i} times" for i in range(10)],
        }
        for n, color in enumerate(COLORS)  # one image has the id 0
    ]
    return {"data/validation-00000-of-00003-abcdef.parquet": table(fields, rows)}


def gqa() -> dict[str, pa.Table]:
    kinds = pa.struct([("structural", TEXT), ("semantic", TEXT), ("detailed", TEXT)])
    fields = {
        "id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT, "isBalanced": pa.bool_(),
        "entailed": TEXT, "equivalent": TEXT, "types": kinds, "semanticStr": TEXT,
    }  # fmt: skip
    asked = [
        ("201307251", "n1", "Is the sky dark?", "yes"),
        ("201307252", "n1", "What color is the wall?", "light blue"),
        ("201640614", "n2", "Who wears a t-shirt?", "t-shirt"),
        ("201640615", "n2", "Which side?", "left"),
    ]
    rows = [{"id": i, "imageId": image, "question": q, "answer": a} for i, image, q, a in asked]
    images = [{"id": "n2", "image": picture("green")}, {"id": "n1", "image": picture("blue")}]
    return {
        "testdev_balanced_instructions/testdev-00000-of-00001.parquet": table(fields, rows),
        "testdev_balanced_images/testdev-00000-of-00001.parquet": table({"id": TEXT, "image": IMAGE}, images),
    }


def mmbench() -> dict[str, pa.Table]:
    """Question 7 in four rotations, question 9 in two; the copies stand behind both base rows."""
    fields = {
        "index": pa.int64(), "question": TEXT, "hint": TEXT, "answer": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT,
        "category": TEXT, "image": IMAGE, "source": TEXT, "L2-category": TEXT, "comment": TEXT, "split": TEXT,
    }  # fmt: skip
    four, two = ["cat", "dog", "bus", "tree"], ["yes", "no"]

    def copy(base: int, turn: int, options: list[str], hint: str, category: str) -> dict:
        turned = options[turn:] + options[:turn]
        letters = {letter: turned[i] if i < len(turned) else "nan" for i, letter in enumerate("ABCD")}
        return {
            "index": base + turn * 1_000_000, "question": f"What is in picture {base}?", "hint": hint, **letters,
            "answer": "ABCD"[turned.index(options[0])], "category": category, "L2-category": "coarse_perception",
            "image": picture(), "source": "made up", "split": "dev",
        }  # fmt: skip

    rows = [copy(7, 0, four, "nan", "image_topic"), copy(9, 0, two, "Look well.", "image_scene")]
    rows += [copy(7, turn, four, "nan", "image_topic") for turn in (1, 2, 3)]
    rows += [copy(9, 1, two, "Look well.", "image_scene")]
    return {"en/dev-00000-of-00001.parquet": table(fields, rows)}


def mme() -> dict[str, pa.Table]:
    """Three images of three categories; the questions of a pair do not stand together."""
    fields = {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT}
    pairs = [("existence", "existence/1.jpg"), ("OCR", "OCR/1.jpg"), ("code_reasoning", "code_reasoning/0020.png")]
    rows = [
        {
            "question_id": image,
            "image": picture(),
            "question": f"Is it {right} that {category}? Please answer yes or no.",
            "answer": right,
            "category": category,
        }
        for right in ("Yes", "No")
        for category, image in pairs
    ]
    return {"data/test-00000-of-00004-a1b2.parquet": table(fields, rows)}


def mmmu() -> dict[str, pa.Table]:
    images = {f"image_{k}": IMAGE for k in range(1, 8)}
    fields = {
        "id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT, **images, "img_type": TEXT, "answer": TEXT,
        "topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT,
    }  # fmt: skip
    choice, two = {"question_type": "multiple-choice"}, {"image_1": picture("red"), "image_2": picture("blue")}
    rows = [
        {**choice, "id": "validation_Art_1", "question": "What is <image 1>?", "answer": "B", "image_1": picture("red"),
         "options": "['a bowl', \"a painter's hat\", 'a wall']"},
        {**choice, "id": "validation_Art_Theory_12", "question": "Which of these?", "answer": "A", **two,
         "options": "['<image 2>', '<image 1>']"},
        {"question_type": "open", "id": "validation_Math_15", "question": "How many in <image 1>?", "options": "[]",
         "answer": "12.50", "image_1": picture("white")},
    ]  # fmt: skip
    return {"data/validation-00000-of-00001.parquet": table(fields, rows)}


def ok_vqa() -> dict[str, pa.Table]:
    fields = {
        "question_id": TEXT,
        "image": IMAGE,
        "question": TEXT,
        "answers": TEXTS,
        "question_type": TEXT,
        "answer_type": TEXT,
    }
    rows = [
        {
            "question_id": "2971475",
            "question": "What sport is it?",
            "answers": ["race"] * 8 + ["racing"] * 2,
            "question_type": "one",
        },
        {"question_id": "3397615", "question": "How many?", "answers": ["two"] * 2 + ["3"] * 8, "question_type": "two"},
        {"question_id": "3397616", "question": "Which brand?", "answers": ["acme"] * 10, "question_type": "two"},
    ]
    return {"data/val2014-00000-of-00002.parquet": table(fields, [{**row, "image": picture()} for row in rows])}


def pope() -> dict[str, pa.Table]:
    """The same ids in each category, all about one image."""
    fields = {
        "id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "image": IMAGE,
        "category": TEXT,
    }  # fmt: skip
    rows = [
        {"id": str(n), "question_id": str(n), "question": f"Is there a {thing} in the image?", "answer": answer,
         "image_source": "COCO_val2014_000000310196", "image": picture(), "category": category}
        for category in ("adversarial", "popular", "random")
        for n, (thing, answer) in enumerate([("snowboard", "yes"), ("car", "no")], 1)
    ]  # fmt: skip
    return {"data/test-00000-of-00003.parquet": table(fields, rows)}


def scienceqa() -> dict[str, pa.Table]:
    fields = {
        "image": IMAGE, "question": TEXT, "choices": TEXTS, "answer": pa.int8(), "hint": TEXT, "task": TEXT,
        "grade": TEXT, "subject": TEXT, "topic": TEXT, "category": TEXT, "skill": TEXT, "lecture": TEXT,
        "solution": TEXT,
    }  # fmt: skip
    rows = [
        {"question": "Which is a solid?", "choices": ["water", "rock"], "answer": 1, "subject": "natural science"},
        {
            "question": "Where?",
            "choices": ["a", "b", "c", "d", "e"],
            "answer": 4,
            "hint": "See the map.",
            "subject": "social science",
        },
        {"question": "Which?", "choices": ["x", "y", "z"], "answer": 0, "subject": "natural science"},
    ]
    return {
        "ScienceQA-IMG/test-00000-of-00001-f0.parquet": table(fields, [{**row, "image": picture()} for row in rows])
    }


def seedbench() -> dict[str, pa.Table]:
    """Two image rows around a video row of eight frames."""
    fields = {
        "answer": TEXT, "choice_a": TEXT, "choice_b": TEXT, "choice_c": TEXT, "choice_d": TEXT, "data_id": TEXT,
        "data_type": TEXT, "question": TEXT, "question_id": TEXT, "question_type_id": pa.int16(),
        "image": pa.list_(IMAGE), "segment": pa.list_(pa.int64()),
    }  # fmt: skip
    options = {f"choice_{letter}": f"{letter} thing" for letter in "abcd"}
    rows = [
        {**options, "question_id": "101669", "question": "What is it?", "answer": "A", "data_type": "image",
         "question_type_id": 1, "image": [picture("red")]},
        {**options, "question_id": "v1", "question": "What happens?", "answer": "B", "data_type": "video",
         "question_type_id": 10, "image": [picture("blue")] * 8},
        {**options, "question_id": "101670", "question": "Where is it?", "answer": "D", "data_type": "image",
         "question_type_id": 5, "image": [picture("green")]},
    ]  # fmt: skip
    return {"data/test-00000-of-00040.parquet": table(fields, rows)}


def demo() -> dict[str, pa.Table]:
    """Two scenes, of which one has no digit, and a photograph nobody asks about."""
    asked = {
        "exist": ("is there a red ring ?", "yes"), "attr": ("what color is the ring ?", "red"),
        "where": ("where is the red ring ?", "top left"), "count": ("how many shapes are there ?", "two"),
        "rel": ("is the red ring above the blue star ?", "no"), "text": ("what digit is written ?", "7"),
        "mc": ("what color is the ring ? A blue B red C cyan D white", "B"),
        "bg": ("what color is the background ?", "gray"),
    }  # fmt: skip
    questions = [{"task": task, "question": question, "answer": answer} for task, (question, answer) in asked.items()]
    references = ["a large red ring on a gray background .", "one shape : a large red ring on a gray background ."]
    rows = [
        {"id": "scene-0", "image": picture("red"), "references": references, "questions": questions},
        {"id": "scene-1", "image": picture("blue"), "references": ["a small blue star on a dark background ."],
         "questions": [q for q in questions if q["task"] != "text"]},
        {"id": "photo-0", "image": None, "references": None, "questions": None},
    ]  # fmt: skip
    return {"scenes-00000.parquet": pa.Table.from_pylist(rows, DEMO_SCHEMA)}


FIXTURES = {
    "COCO-Caption2017": coco, "flickr30k": flickr30k, "GQA": gqa, "MMBench": mmbench, "MME": mme, "MMMU": mmmu,
    "NoCaps": nocaps, "OK-VQA": ok_vqa, "POPE": pope, "ScienceQA": scienceqa, "SEED-Bench": seedbench, "": demo,
}  # fmt: skip


def write_fixtures(folder: Path) -> None:
    """Writes every benchmark's files, in row groups of two rows."""
    for repo, make in FIXTURES.items():
        for name, content in make().items():
            path = folder / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(content, path, row_group_size=2)


if __name__ == "__main__":
    write_fixtures(Path(sys.argv[1]))
