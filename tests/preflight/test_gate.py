"""The gate and the cap: numbers that must hold before a run begins, and dollars that end it."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.load import load_config
from pipelines.corpus.truth import Truth
from pipelines.errors import UserError
from pipelines.metrics import cider_d
from pipelines.metrics.coco_objects import COCO
from pipelines.preflight import gate, pairwise
from pipelines.preflight.gate import judge
from pipelines.preflight.gate_metrics import compare
from pipelines.preflight.pairwise import Judged
from pipelines.run.job import Actors, prepare
from pipelines.run.outcome import Compared, Outcome
from pipelines.stages.unit_batch import Sample, UnitBatch
from tests.helpers import LOCAL, QUICK, addresses, fake_encoder, fake_generator, run_captions
from tests.preflight.test_pairwise import Judge, said

TEXTS = ["a red circle", "two blue squares on grass", "a small cat by a door", "the digit 7", "nothing at all here"]
PICTURE = Sample(jpeg="", width=224, height=112, kept=[0], rows=1, columns=2)


def compared(pruned: list[str], references: bool = True, agreement: float = 0.5) -> dict:
    rest = {"picture": asdict(PICTURE), "agreement": agreement, "prompt": "describe"}
    return {
        ("a", i, 0): Compared("a", i, pruned=text, unpruned=other, references=[other] if references else [], **rest)
        for i, (text, other) in enumerate(zip(pruned, TEXTS, strict=False))
    }


def test_captions_as_good_as_unpruned_ones_have_quality_one():
    gate = judge(compared(TEXTS), 0.99)
    assert gate.passed
    assert gate.metric == "cider"
    assert gate.quality == pytest.approx(1)
    assert gate.interval == (pytest.approx(1), pytest.approx(1))


def test_quality_is_the_ratio_of_ciders_and_its_lower_end_decides():
    worse = [TEXTS[0], "something else", *TEXTS[2:]]
    gate = judge(compared(worse), 0.7)
    references = {i: [text] for i, text in enumerate(TEXTS)}
    expected = cider_d(dict(enumerate(worse)), references) / cider_d(dict(enumerate(TEXTS)), references)
    assert gate.quality == pytest.approx(expected)
    assert gate.interval[0] < 0.7 < gate.quality, "five images are too few to be sure"
    assert not gate.passed
    assert f"quality {gate.quality:.4f} of unpruned ({gate.interval[0]:.4f} to" in str(gate)
    assert "does not reach gate.min_quality=0.7" in str(gate)


def test_without_references_it_is_the_agreement_with_the_unpruned_captions():
    gate = judge(compared(TEXTS, references=False, agreement=0.8), 0.75)
    assert gate.metric == "rouge_l"
    assert (gate.quality, gate.unpruned_score) == (pytest.approx(0.8), 1.0)
    assert gate.passed


def test_images_without_references_do_not_count_where_most_have_some():
    pairs = compared(TEXTS[:3]) | {("b", 0, 0): compared(["no photograph"], references=False)["a", 0, 0]}
    gate = judge(pairs, 0.99)
    assert (gate.metric, gate.images, gate.quality) == ("cider", 3, pytest.approx(1))
    pairs |= {("b", i, 0): pairs["b", 0, 0] for i in range(1, 4)}
    assert judge(pairs, 0.99).metric == "rouge_l"


def test_the_report_gets_the_worst_disagreements_first():
    pairs = compared(TEXTS)
    pairs |= compared(["poor", *TEXTS[1:2]], agreement=0.1)
    assert [each.agreement for each in judge(pairs, 0.5).compared] == [0.1, 0.1, 0.5, 0.5, 0.5]


def telling(pruned: str | None) -> type:
    """A generator that says the image's own name; of every second of the gate's images, where pruned, `pruned`."""

    class Telling(fake_generator()):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(super().__call__(row))
            for image in unit_batch.images:
                image.references = image.references and [f"scene {image.sha256[:9]} in full view"]
                full = pruned is None or image.sample is None or image.sample.kept == [0, 1] or image.row % 2
                text = f"scene {image.sha256[:9]} in full view" if full else pruned
                image.answers = [replace(image.answers[0], caption=text), *image.answers[1:]]
            return unit_batch.to_row()

    return Telling


def sampling(seconds: float) -> type:
    """An encoder that keeps both tokens unpruned and one otherwise."""

    class Sampling(fake_encoder(seconds=seconds)):
        def __init__(self, **arguments: Any) -> None:
            self.kept = [0, 1] if arguments["prune"].method == "none" else [0]

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(super().__call__(row))
            for image in unit_batch.images:
                if image.sampled:
                    image.sample = replace(PICTURE, kept=self.kept)
            return unit_batch.to_row()

    return Sampling


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, scene_parquet: Callable[..., Path]) -> Path:
    return scene_parquet(tmp_path_factory.mktemp("corpus") / "scenes.parquet", 24, row_group_size=8)


def run(corpus: Path, output: Path, *arguments: str, pruned: str | None = None, seconds: float = 0.0) -> Outcome:
    small = ["unit.images=4", "encode.batch_size=4", "generate.batch_size=4", "gate.images=16"]
    job = prepare(
        load_config([*QUICK, LOCAL, *small, f"input.path={corpus}", f"output.path={output}", *arguments]),
        Actors(sampling(seconds), telling(pruned)),
    )
    return run_captions(job)


def test_a_failed_gate_stops_with_code_3_and_the_numbers_before_anything_is_captioned(corpus: Path, tmp_path: Path):
    outcome = run(corpus, tmp_path, "gate.min_quality=0.9", pruned="a scene")
    assert outcome.code == 3
    assert outcome.gate is not None
    assert outcome.gate.quality == pytest.approx(0.5)
    assert outcome.gate.images == len(outcome.gate.compared) == 16
    assert all(each.picture == asdict(PICTURE) for each in outcome.gate.compared), "as the pruned model saw it"
    assert 0 < outcome.metrics["gate/quality_low"] < 0.5 < outcome.metrics["gate/quality_high"] < 0.9
    assert "gate failed: quality 0.5000 of unpruned (0." in outcome.message
    assert addresses(tmp_path) == []
    assert json.loads((tmp_path / "heartbeat.json").read_text())["state"] == "gate failed"
    again = run(corpus, tmp_path, "gate.min_quality=0.1", pruned="not asked a second time")
    assert again.code == 0, "the numbers are there, and are judged anew"
    assert again.gate is not None
    assert again.gate.quality == outcome.gate.quality
    assert len(addresses(tmp_path)) == 24


def test_a_gate_that_holds_lets_the_run_begin(corpus: Path, tmp_path: Path):
    outcome = run(corpus, tmp_path / "pruned", "gate.min_quality=0.99")
    assert outcome.code == 0
    assert outcome.gate is not None
    assert outcome.gate.interval == (pytest.approx(1), pytest.approx(1))
    assert outcome.metrics["gate/quality"] == pytest.approx(1)
    parts = {name: value for name, value in outcome.metrics.items() if name.startswith("usd/")}
    assert parts["usd/gate"] > 0, "its sample is no start-up and no idle time"
    assert sum(parts.values()) == pytest.approx(outcome.metrics["usd_total"])
    assert len(addresses(tmp_path / "pruned")) == 24
    outcome = run(corpus, tmp_path / "none", "gate.min_quality=0.99", "prune.method=none")
    assert (outcome.code, outcome.gate) == (0, None), "unpruned there is nothing to compare"


def test_the_numbers_of_another_part_of_the_corpus_are_not_taken_over(corpus: Path, tmp_path: Path):
    assert run(corpus, tmp_path, "gate.min_quality=0.9", "input.limit=16").code == 0
    outcome = run(corpus, tmp_path, "gate.min_quality=0.9", pruned="a scene")
    assert outcome.code == 3
    assert len(addresses(tmp_path)) == 16


def test_too_few_images_are_no_verdict(corpus: Path, tmp_path: Path, monkeypatch):
    compare = gate._compare
    monkeypatch.setattr(gate, "_compare", lambda *sides: dict(list(compare(*sides).items())[:7]))
    outcome = run(corpus, tmp_path, "gate.min_quality=0.1")
    assert outcome.code == 1
    assert "too little to compare: 7 of 16 sampled images came through twice" in outcome.message


def test_the_cap_counts_the_earlier_runs_of_the_output(corpus: Path, tmp_path: Path):
    """Every run costs at least a unit's time, and the second is not even started."""
    capped = ("cost.usd_per_hour=3600", "budget.max_usd=0.001")
    first = run(corpus, tmp_path, *capped, seconds=0.5)  # so that not all are done before the first is heard of
    assert first.code == 4
    done = addresses(tmp_path)
    assert 0 < len(done) < 24
    second = run(corpus, tmp_path, *capped)
    assert second.code == 4
    assert "of it by 1 earlier runs; a higher cap resumes" in second.message
    assert addresses(tmp_path) == done
    third = run(corpus, tmp_path, "cost.usd_per_hour=3600", "budget.max_usd=100000")
    assert third.code == 0
    assert len(addresses(tmp_path)) == 24
    spent = json.loads((tmp_path / "run.json").read_text())["spent"]
    assert spent["usd"] == pytest.approx(first.metrics["usd_total"] + third.metrics["usd_total"], rel=0.01)
    assert third.metrics["usd_of_output"] == pytest.approx(spent["usd"], rel=0.01)


def test_a_cap_without_a_price_is_refused(corpus: Path, tmp_path: Path):
    with pytest.raises(UserError, match="needs the price of every node: 1 node: unknown node: it has neither"):
        run(corpus, tmp_path, "cost.usd_per_hour=null", "budget.max_usd=5")
    assert addresses(tmp_path) == []
    assert not (tmp_path / "heartbeat.json").exists()


# The metric


LONG = " ".join(["word"] * 40)


def long(pruned: list[str], unpruned: list[str], references: bool = False) -> dict:
    rest = {"picture": asdict(PICTURE), "agreement": 0.5, "prompt": "describe"}
    return {
        ("a", i, 0): Compared("a", i, pruned=f"{p} {LONG}", unpruned=f"{u} {LONG}", references=[u] * references, **rest)
        for i, (p, u) in enumerate(zip(pruned, unpruned, strict=True))
    }


def known(there: str, number: int) -> Truth:
    return Truth(COCO, {("a", i): frozenset(there.split()) for i in range(number)})


def test_long_captions_are_compared_by_the_objects_they_name_where_these_are_known():
    pairs = long(["a dog", "a dog and a cat", "a cat", "a dog"], ["a dog"] * 4, references=True)
    found = compare(pairs, read_truth=lambda: known("dog", 4))
    # of five mentions three are there, and three of four dogs are found
    assert found.metric == "objects"
    assert found.pruned_score == pytest.approx(2 / (5 / 3 + 4 / 3))
    assert (found.unpruned_score, found.quality) == (1.0, found.pruned_score)
    assert found.interval[0] < found.quality < found.interval[1]
    assert compare(compared(TEXTS), read_truth=lambda: known("dog", 5)).metric == "cider", "short ones are not"


def test_without_objects_they_are_compared_by_the_judge_and_without_a_judge_the_gate_says_what_that_means():
    pairs = long(TEXTS, TEXTS)
    prefers = compare(pairs, judge=lambda captions: verdict([1.0, 1.0, 0.5, 0.0, 0.0]))
    assert (prefers.metric, prefers.quality, prefers.pruned_score, prefers.note) == ("judge", 1.0, 0.5, "")
    assert prefers.judged["judge/wins"] == 2
    alone = compare(pairs)
    assert (alone.metric, alone.quality) == ("rouge_l", 0.5)
    assert "set quality.objects or quality.judge" in alone.note
    assert alone.note in str(judge(pairs, 0.1))


def test_a_judge_that_judges_too_little_is_replaced_and_its_cost_is_kept():
    silent = compare(long(TEXTS, TEXTS), "judge", judge=lambda captions: verdict([1.0, None, None, None, None]))
    assert (silent.metric, silent.note) == ("rouge_l", "the judge judged too little")
    assert silent.judged["judge/unjudged"] == 4


@pytest.mark.parametrize(("metric", "needs"), [("cider", "reference captions"), ("objects", "quality.objects")])
def test_a_metric_that_was_asked_for_is_that_or_none(metric, needs):
    with pytest.raises(ValueError, match=f"gate.metric={metric} needs .*{needs}"):
        compare(long(TEXTS, TEXTS), metric)
    assert compare(compared(TEXTS), "rouge_l").metric == "rouge_l"


def test_the_gate_asks_a_real_judge_with_the_images_of_the_corpus(corpus: Path, tmp_path: Path):
    with Judge() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.reply = lambda a, b: said('{"better": "tie"}', prompt_tokens=10, completion_tokens=1)
        asked = ("gate.metric=judge", f"quality.judge.url={server.url}", "quality.judge.model=m")
        outcome = run(corpus, tmp_path, "gate.min_quality=0.9", *asked)
        server.shutdown()
    assert outcome.code == 0
    assert outcome.gate is not None
    assert (outcome.gate.metric, outcome.gate.quality) == ("judge", 1.0)
    assert outcome.metrics["gate/judge/input_tokens"] == 320
    shown = {request["messages"][0]["content"][0]["image_url"]["url"] for request in server.asked}
    assert len(shown) == 16
    assert all(url.startswith("data:image/png;base64,") for url in shown)


def test_a_dead_judge_does_not_stop_the_run(corpus: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pairwise, "ATTEMPTS", 1)
    asked = ("gate.metric=judge", "quality.judge.url=http://127.0.0.1:9", "quality.judge.model=m")
    outcome = run(corpus, tmp_path, "gate.min_quality=0.9", *asked)
    assert outcome.code == 0
    assert outcome.gate is not None
    assert outcome.gate.metric == "cider"
    assert "the judge judged too little" in str(outcome.gate)


def test_a_judge_that_is_not_described_is_refused_before_the_run(corpus: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"gate.metric=judge needs quality.judge.url"):
        run(corpus, tmp_path, "gate.min_quality=0.9", "gate.metric=judge")


def verdict(scores: list[float | None]) -> Judged:
    signs = [round(2 * score - 1) for score in scores if score is not None]
    counts = [signs.count(sign) for sign in (1, 0, -1)]
    unjudged = {"slow": lost} if (lost := scores.count(None)) else {}
    return Judged("m", len(scores), *counts, None, None, None, unjudged, 10, 0, 0, None, 1.0, scores)
