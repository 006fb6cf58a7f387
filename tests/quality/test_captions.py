"""Quality of captions without questions: read from outputs and corpora as the caption job leaves them."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.corpus import SCHEMA
from demo.language import caption, references
from demo.world import scene_at
from jobs.quality import main
from pipelines.config.load import load_config
from pipelines.corpus.file import CorpusFile
from pipelines.errors import UserError
from pipelines.metrics import cider_d
from pipelines.output.unit import Unit, unit_key
from pipelines.quality.captions import Quality, measure_agreement, measure_quality, measure_references
from pipelines.quality.config import QualityConfig
from pipelines.stages.unit_batch import Answer, Image, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store
from tests.helpers import DEMO, write_corpus
from tests.preflight.test_pairwise import Judge

SAID = ["a red bus .", "two dogs play with a ball .", "a cat sleeps on a mat .", "a train at the station ."]
REFERENCES = [["a red bus"], ["dogs with a ball", "two dogs"], ["the cat on the mat"], ["a train"]]


def write_output(folder: Path, captions: Sequence[str], reasons: Sequence[str] | None = None) -> Path:
    """An output with two captions a unit, of rows 0 and on of `a.parquet`."""
    key = unit_key([CorpusFile("a.parquet", 1, (len(captions),))], "f")
    sink = Sink(store=Store(str(folder)), fingerprint="f", model="m", method="none")
    for start in range(0, len(captions), 2):
        stop = min(start + 2, len(captions))
        answers = [Answer(captions[i], 1, 2, 3, reasons[i] if reasons else "stop") for i in range(start, stop)]
        images = [
            Image(f"row-{i}", "a.parquet", i, "0" * 64, ["describe"], answers=[answer])
            for i, answer in enumerate(answers, start)
        ]
        sink.commit(UnitBatch(Unit(key, start, stop, ("a.parquet",)), images))
    return folder


def measure(*arguments: str) -> Quality:
    return measure_quality(load_config([*DEMO, "input.path=", "resamples=20", *arguments], QualityConfig))


def test_captions_are_judged_by_themselves(tmp_path: Path):
    looping = "a dog and" + " a dog and" * 5
    write_output(tmp_path, [SAID[0], "", looping, SAID[0]], ["stop", "stop", "length", "stop"])
    quality = measure(f"output.path={tmp_path}")
    assert quality.captions == 4
    assert quality.health["empty"] == quality.health["truncated"] == quality.health["looping"] == 0.25
    assert quality.health["distinct"] == 0.75
    assert quality.agreement is quality.references is None


def test_prompts_of_one_image_are_no_further_evidence():
    """Four prompts with the same answers leave the interval as wide as one does."""
    theirs = [SAID[0], "two cats", "nothing", SAID[3]]

    def measured(prompts: int) -> dict:
        ours, others = (
            {("a", row, f"prompt {i}"): text for row, text in enumerate(said) for i in range(prompts)}
            for said in (SAID, theirs)
        )
        return measure_agreement(ours, others, 200)

    four, one = measured(4), measured(1)
    for name in ("rouge_l", "exact_match"):  # CIDEr weighs words by how many captions have them
        assert four[name] == pytest.approx(one[name])


def test_captions_of_several_prompts_are_all_held_against_the_references_of_their_image():
    def measured(prompts: int) -> dict:
        keys = [("a", row, f"prompt {i}") for row in range(len(SAID)) for i in range(prompts)]
        captions, references = ({key: texts[key[1]] for key in keys} for texts in (SAID, REFERENCES))
        return measure_references(captions, references, 200)

    three, one = measured(3), measured(1)
    assert three.keys() == one.keys() == {"CIDEr", "Bleu_4", "ROUGE_L"}
    # CIDEr weighs words by how many captions have them, and BLEU adds a tiny constant to its sums.
    assert three["ROUGE_L"] == pytest.approx(one["ROUGE_L"])


def test_agreement_is_over_what_both_outputs_hold(tmp_path: Path):
    ours = write_output(tmp_path / "a", SAID)
    theirs = write_output(tmp_path / "b", [SAID[0], SAID[1], "a cat ."])
    quality = measure(f"output.path={ours}", f"baseline.path={theirs}")
    assert quality.agreed_on == 3
    assert quality.agreement
    assert quality.agreement["exact_match"][0] == pytest.approx(2 / 3)
    assert quality.agreement["extra_tokens"][0] == pytest.approx(4 / 3)  # "sleeps on a mat"
    expected = cider_d(dict(enumerate(SAID[:3])), {0: [SAID[0]], 1: [SAID[1]], 2: ["a cat ."]})
    value, low, high = quality.agreement["cider"]
    assert value == pytest.approx(expected)
    assert low <= value <= high


def test_references_come_from_the_corpus_row_by_row(tmp_path: Path, scene_png):
    images = [scene_png(0)] * 5
    corpus = write_corpus(tmp_path / "in" / "a.parquet", images, references=[*REFERENCES, []])
    output = write_output(tmp_path / "out", [*SAID, "nobody knows"])
    quality = measure(f"output.path={output}", f"input.path={corpus.parent}")
    assert quality.referenced == 4
    assert quality.references
    assert quality.references["CIDEr"][0] == pytest.approx(cider_d(dict(enumerate(SAID)), dict(enumerate(REFERENCES))))
    assert set(quality.references) == {"CIDEr", "Bleu_4", "ROUGE_L"}


def test_a_sample_holds_the_same_images_of_every_output(tmp_path: Path):
    many = [f"thing number {i}" for i in range(40)]
    ours, theirs = write_output(tmp_path / "a", many), write_output(tmp_path / "b", many)
    quality = measure(f"output.path={ours}", f"baseline.path={theirs}", "sample=7")
    assert (quality.captions, quality.agreed_on) == (7, 7)
    assert quality.agreement
    assert quality.agreement["exact_match"][0] == 1


@pytest.mark.slow
def test_the_command_line_prints_and_writes_what_it_measured(tmp_path: Path, capsys):
    output = write_output(tmp_path, SAID)
    assert main([*DEMO, "input.path=", f"output.path={output}"]) == 0
    assert "4 captions" in capsys.readouterr().out
    assert json.loads((output / "quality.json").read_text())["health"]["distinct"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("output.path={0}/none", "output.path must be the output of a caption job"),
        ("output.path={0}/a baseline.path={0}/none", "baseline.path must be the output of a caption job"),
        ("output.path={0}/a baseline.path={0}/b", "captions of the same images and prompts"),
        ("output.path={0}/a sample=1", "sample must be at least 2"),
    ],
)
def test_mistakes_end_with_code_2(arguments: str, says: str, tmp_path: Path, capsys):
    write_output(tmp_path / "a", SAID)
    other = write_output(tmp_path / "b", SAID)
    for part in sorted((other / "captions").iterdir()):
        part.unlink()
    sink = Sink(store=Store(str(other)), fingerprint="f", model="m", method="none")
    image = Image("x", "b.parquet", 0, "0" * 64, ["describe"], answers=[Answer("x", 1, 2, 3, "stop")])
    sink.commit(UnitBatch(Unit("0" * 12, 0, 1, ("b.parquet",)), [image]))
    assert main([*DEMO, "input.path=", *arguments.format(tmp_path).split()]) == 2
    assert says in capsys.readouterr().err


# Objects and the judge


def scenes_corpus(folder: Path, captions: int = 12) -> tuple[Path, list[str]]:
    """A corpus of demo scenes as the demo builds it, and the true caption of each row."""
    scenes = [scene_at("corpus", i) for i in range(captions)]
    rows = [
        {
            "id": f"scene-{i}",
            "image": {"bytes": b"", "path": None},
            "references": references(scene),
            "questions": [],
            "scene": json.dumps(scene.to_dict()),
        }
        for i, scene in enumerate(scenes)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "a.parquet")
    return folder, [caption(scene) for scene in scenes]


def test_captions_of_drawn_scenes_are_held_against_the_scenes(tmp_path: Path):
    corpus, true = scenes_corpus(tmp_path / "in")
    right = measure(f"output.path={write_output(tmp_path / 'a', true)}", f"input.path={corpus}")
    assert right.objects is not None
    assert right.known == 12
    assert (right.objects["chair_s"][0], right.objects["object_recall"][0], right.objects["described"]) == (
        0,
        1,
        (1, 1, 1),
    )
    assert "place_accuracy" not in right.objects, "these captions name no places"
    shifted = [*true[1:], true[0]]
    wrong = measure(f"output.path={write_output(tmp_path / 'b', shifted)}", f"input.path={corpus}")
    assert wrong.objects is not None
    value, low, high = wrong.objects["chair_i"]
    assert low < value < high
    assert wrong.objects["color_accuracy"][0] < 0.6
    none = measure(f"output.path={tmp_path / 'a'}", f"input.path={corpus}", "quality.objects=none")
    assert none.objects is None


def test_captions_of_coco_are_held_against_the_instances_and_the_references(tmp_path: Path, scene_png):
    """As CHAIR is published: an object is there if it is annotated, or named by a reference."""
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(0)] * 4, references=REFERENCES)
    instances = tmp_path / "instances.json"
    categories = [{"id": i, "name": name} for i, name in enumerate(("bus", "dog", "cat", "train", "bench"))]
    annotations = [{"image_id": i, "category_id": category} for i, category in enumerate((0, 1, 2, 4))]
    content = {"images": [{"id": i} for i in range(4)], "categories": categories, "annotations": annotations}
    instances.write_text(json.dumps(content))
    output = write_output(tmp_path / "out", [*SAID[:2], "a dog on a mat", SAID[3]])
    quality = measure(f"output.path={output}", f"input.path={corpus.parent}", f"quality.instances={instances}")
    assert quality.objects is not None
    assert quality.objects["chair_i"][0] == pytest.approx(1 / 5)  # bus, dogs, ball, dog, train: no dog in the third
    assert quality.objects["chair_s"][0] == pytest.approx(1 / 4)
    assert quality.objects["object_recall"][0] == pytest.approx(4 / 6)  # neither the cat nor the bench
    alone = measure(f"output.path={output}", f"input.path={corpus.parent}", "quality.objects=coco")
    assert alone.objects is not None
    assert alone.objects["object_recall"][0] == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), ("[]", "must hold images"), ("{", "quality.instances"), ("known", "must know images")],
)
def test_instances_of_another_kind_are_refused(tmp_path: Path, scene_png, content: str | None, says: str):
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(0)] * 2)
    other = {"images": [{"id": 99}], "categories": [], "annotations": []}
    if content is not None:
        (tmp_path / "i.json").write_text(json.dumps(other) if content == "known" else content)
    output = write_output(tmp_path / "out", SAID[:2])
    with pytest.raises(UserError, match=says):
        measure(f"output.path={output}", f"input.path={corpus.parent}", f"quality.instances={tmp_path / 'i.json'}")


def test_the_judge_sees_the_images_of_the_corpus(tmp_path: Path, scene_png):
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i) for i in range(4)])
    ours, theirs = write_output(tmp_path / "a", SAID), write_output(tmp_path / "b", ["g " + text for text in SAID])
    with Judge() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        asked = (f"quality.judge.url={server.url}", "quality.judge.model=m", "quality.judge.pairs=3")
        quality = measure(f"output.path={ours}", f"baseline.path={theirs}", f"input.path={corpus.parent}", *asked)
        server.shutdown()
    assert quality.judged is not None
    assert (quality.judged.pairs, quality.judged.losses, quality.judged.preference) == (3, 3, 0.0)
    assert {r["messages"][0]["content"][0]["image_url"]["url"][:22] for r in server.asked} == {"data:image/png;base64,"}
    with pytest.raises(UserError, match=r"needs baseline\.path and input\.path"):
        measure(f"output.path={ours}", f"input.path={corpus.parent}", *asked)
