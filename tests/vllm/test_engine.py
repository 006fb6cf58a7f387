"""vLLM on the demo model says what transformers says; neither odd requests nor its own end are the end of the job."""

import asyncio
import signal
import time
from dataclasses import replace

import psutil
import pytest
import torch

from pipelines.stages.unit_batch import QuestionSet, UnitBatch
from tests.helpers import question
from tests.vllm.engines_on_demo import CAPTION, SIZE, DiedError, Running, answers, kept, pixels_of, unit

SCENES = range(48)
RETENTION = 0.098


@pytest.fixture(scope="module")
def features(encoded) -> torch.Tensor:
    return encoded(SCENES)


@pytest.mark.parametrize("retention", [RETENTION, 1.0])
def test_captions_are_word_for_word_those_of_transformers(engine, transformers_engine, features, retention):
    unit_batch = unit(kept(features, retention))
    expected = UnitBatch.from_row(transformers_engine(unit_batch.to_row()))
    assert len(expected.images) == len(SCENES)
    assert answers(engine.run(unit_batch)[0]) == answers(expected)  # texts, numbers of tokens and finish reasons
    assert len({first.caption for first, *_ in answers(expected)}) > 30


def test_units_of_different_numbers_of_tokens_share_the_engine(engine, features):
    """vLLM's own class for embeddings dies of such requests in one step."""
    ratios = (RETENTION, 0.5, RETENTION, 0.05)
    units = [unit(kept(features[:12], ratio), first=100 * i) for i, ratio in enumerate(ratios)]
    alone = [answers(engine.run(unit_batch)[0]) for unit_batch in units]
    assert [answers(unit_batch) for unit_batch in engine.run(*units)] == alone
    assert alone[0] == alone[2] != alone[1]
    within = unit([kept(features[i : i + 1], ratio)[0] for i, ratio in enumerate(ratios)])
    expected = [each[i] for i, each in enumerate(alone)]
    assert answers(engine.run(within)[0]) == expected


def test_prompts_and_their_limits_are_each_images_own(engine, transformers_engine, features):
    unit_batch = unit(kept(features[:4], RETENTION), [[CAPTION, "how many shapes are there ?"]] * 4)
    for image in unit_batch.images:
        image.question_set = QuestionSet([question(max_new_tokens=n) for n in (5, 2)])
    expected = answers(UnitBatch.from_row(transformers_engine(unit_batch.to_row())))
    assert [answer.num_generated_tokens for answer in expected[0]] == [5, 2]
    assert answers(engine.run(unit_batch)[0]) == expected


def test_a_question_about_two_pictures_reads_both(engine, transformers_engine, features):
    unit_batch = unit(kept(features[:3], RETENTION), [[CAPTION], [CAPTION]])
    unit_batch.images[0].question_set, unit_batch.images[0].sizes = QuestionSet([], num_pictures=2), [SIZE] * 2
    assert answers(engine.run(unit_batch)[0]) == answers(UnitBatch.from_row(transformers_engine(unit_batch.to_row())))


def test_answers_keep_to_a_structure(engine, features, monkeypatch):
    structured = {"structured_outputs": {"choice": ["red", "blue"]}}  # the demo's words have no spaces to ask for
    monkeypatch.setattr(engine.stage, "sampling", engine.stage.sampling | structured)
    done = [first for first, *_ in answers(engine.run(unit(kept(features[:4], RETENTION)))[0])]
    assert {answer.caption for answer in done} <= {"red", "blue"}
    assert {answer.finish_reason for answer in done} == {"stop"}


def test_an_answer_that_vllm_gives_up_is_no_caption(engine, features, monkeypatch):
    impossible = {"structured_outputs": {"regex": "(red blue){2}"}}
    monkeypatch.setattr(engine.stage, "sampling", engine.stage.sampling | impossible)
    (unit_batch,) = engine.run(unit(kept(features[:2], RETENTION)))
    assert [(rejected.row, rejected.reason) for rejected in unit_batch.rejected] == [(0, "generate"), (1, "generate")]


def test_a_stop_string_cuts_an_answer(engine, features, monkeypatch):
    monkeypatch.setattr(engine.stage, "sampling", engine.stage.sampling | {"stop": ["background"]})
    for first, *_ in answers(engine.run(unit(kept(features[:4], RETENTION)))[0]):
        assert "background" not in first.caption
        assert first.finish_reason == "stop"


def test_sampled_answers_depend_on_image_and_seed_alone(engine, features, monkeypatch):
    monkeypatch.setattr(engine.stage, "ladder", replace(engine.stage.ladder, temperature=1.5))
    few, more = unit(kept(features[:2], 0.05)), unit(kept(features[:6], 0.05))
    once = answers(engine.run(few)[0])
    assert answers(engine.run(more)[0])[:2] == once
    monkeypatch.setattr(engine.stage, "ladder", replace(engine.stage.ladder, seed=1))
    assert answers(engine.run(few)[0]) != once


def test_a_request_that_vllm_refuses_is_one_row_of_quarantine(engine, features, monkeypatch):
    unit_batch = unit(kept(features[:6], RETENTION))
    ask = engine.stage._prompt

    def one_too_long(request):
        return {"prompt_token_ids": [10] * 600} if request.image == 3 else ask(request)

    monkeypatch.setattr(engine.stage, "_prompt", one_too_long)
    (done,) = engine.run(unit_batch)
    monkeypatch.undo()
    assert done.error is None
    assert [(rejected.row, rejected.reason) for rejected in done.rejected] == [(3, "generate")]
    expected = answers(engine.run(unit_batch)[0])
    assert answers(done) == expected[:3] + expected[4:]


def test_tokens_of_a_wrong_width_are_refused_and_the_engine_goes_on(engine, features):
    (failed,) = engine.run(unit(torch.zeros(2, 25, 64)))
    assert [rejected.reason for rejected in failed.rejected] == ["generate"] * 2
    assert len(answers(engine.run(unit(kept(features[:2], RETENTION)))[0])) == 2


def test_an_engine_that_hangs_is_cut_off_and_leaves_nothing_behind(engine, features, monkeypatch):
    monkeypatch.setattr(engine.stage, "timeout_seconds", 3.0)
    processes = list(engine.stage.engine.processes)
    assert len(processes) >= 2
    for process in processes:
        process.suspend()

    async def hang() -> None:
        stage = engine.stage
        if stage.watchdog is not None:  # it sleeps by the old limit
            stage.watchdog.cancel()
            stage.watchdog = None
        unit_batch = engine.loop.create_task(stage(unit(kept(features[:3], RETENTION)).to_row()))
        while stage.watchdog is None:
            await asyncio.sleep(0.05)
        try:
            await stage.watchdog
        finally:
            unit_batch.cancel()

    with pytest.raises(DiedError, match=r"finished no request for engine\.timeout_seconds=3"):
        engine.loop.run_until_complete(hang())
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(DiedError, match="the engine died"):  # whoever asks a dead engine learns it at once
        engine.run(unit(kept(features[:2], RETENTION)))


def test_unpruned_it_takes_the_images_themselves_and_a_dead_engine_is_noticed(transformers_engine, features, scene_png):
    expected = answers(UnitBatch.from_row(transformers_engine(unit(features).to_row())))
    engine = Running(images=True)
    try:
        (unit_batch,) = engine.run(unit(pixels_of(scene_png, SCENES), name="pixels"))
        assert answers(unit_batch) == expected
        assert {image.num_visual_tokens for image in unit_batch.images} == {256}
        core = next(p for p in engine.stage.engine.processes if "EngineCore" in " ".join(p.cmdline()) + p.name())
        core.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(DiedError, match="the engine died"):
            engine.run(unit(pixels_of(scene_png, SCENES[:4]), name="pixels"))
        assert time.monotonic() - start < 60
    finally:
        engine.close()
