"""The span plugin in vLLM says what transformers says of the same pruned pictures, and bad requests do not end it."""

import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.exceptions import VLLMClientError  # pyright: ignore[reportMissingImports]

from otprune.vllm.found import GROUP, NAME, ROOT, is_findable
from tests.vllm import tiny
from tests.vllm.references import RATIOS, Case, Picture, case, picture, stock_answer
from tests.vllm.span_engine import ask, equal, start, stop, worst

CLOSE = 1e-4  # of log-probabilities: float32 on both sides, sums in another order

pytestmark = pytest.mark.timeout(1200)


class Family:
    """A tiny checkpoint, four pictures, and transformers' answers to them at three retentions."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.model: Any = tiny.make(name, folder)
        self.pictures: list[Picture] = [picture(self.model, number) for number in range(4)]
        self.cases = [case(self.model, [each], ratio) for each in self.pictures for ratio in RATIOS]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(family) -> Iterator[Any]:
    """Found by the entry point of the installed package: nothing here calls the plugin."""
    running = start(family.folder)
    yield running
    stop(running)


def test_the_references_of_whole_pictures_are_transformers_own_answers(family):
    whole = [each for each in family.cases if each.whole]
    assert [each.tokens for each in whole] == [stock_answer(family.model, [each]) for each in family.pictures]
    assert len({tuple(each.tokens) for each in family.cases}) == len(family.cases)


def test_any_numbers_of_tokens_in_one_step_are_answered_as_by_transformers(family, engine):
    outputs = ask(engine, family.cases)  # first: what is in the encoder's cache meets no other in a step
    assert len({len(each.fields["image_embeds"]) for each in family.cases}) >= len(RATIOS)
    assert equal(outputs, family.cases) == len(family.cases) == 12
    assert worst(outputs, family.cases) < CLOSE


def test_one_by_one_and_once_more_the_answers_are_the_same(family, engine):
    """The second time, prompt and rows come from vLLM's caches."""
    for each in family.cases[:4] + family.cases[:2]:
        outputs = ask(engine, [each])
        assert equal(outputs, [each]) == 1
        assert worst(outputs, [each]) < CLOSE


def test_two_pictures_of_a_prompt_are_answered_as_by_transformers(family, engine):
    pair = [family.pictures[1], family.pictures[2]]
    cases = [case(family.model, pair, ratio) for ratio in RATIOS]
    assert cases[0].tokens == stock_answer(family.model, pair)
    outputs = ask(engine, cases)
    assert equal(outputs, cases) == 3
    assert worst(outputs, cases) < CLOSE


def changed(one: Case, **fields: Any) -> Case:
    return replace(one, fields=one.fields | fields)


def repeated(one: Case, num: int) -> Case:
    """The case with a picture of more than `num` tokens."""
    times = num // len(one.fields["image_embeds"]) + 1
    numbers = ("image_rows", "image_lengths", "image_extents")
    return replace(
        one,
        fields={
            name: value * times if name in numbers else torch.cat([value] * times) for name, value in one.fields.items()
        },
    )


def test_wrong_positions_give_other_answers(family, engine):
    """From the same rows, which vLLM has in its caches by now."""
    if "image_positions" not in family.cases[0].fields:
        pytest.skip("this family counts its tokens")
    pruned = [each for each in family.cases if not each.whole]
    counted = [
        changed(
            each,
            image_positions=torch.arange(len(each.fields["image_tokens"]))[:, None].expand(-1, 3).contiguous(),
            image_extents=each.fields["image_lengths"],
        )
        for each in pruned
    ]
    outputs = ask(engine, counted)
    assert equal(outputs, pruned) <= 1
    assert worst(outputs, pruned) > 100 * CLOSE
    assert equal(ask(engine, pruned), pruned) == len(pruned)


def test_rows_without_their_deepstack_give_other_answers(family, engine):
    if "qwen3" not in family.name:
        pytest.skip("this family has no DeepStack")
    without = []
    for each in family.cases:
        rows = each.fields["image_embeds"].clone()
        rows[:, tiny.TEXT["hidden_size"] :] = 0
        without.append(changed(each, image_embeds=rows))
    outputs = ask(engine, without)
    assert equal(outputs, family.cases) <= 2
    assert worst(outputs, family.cases) > 100 * CLOSE


def test_malformed_requests_are_refused_and_the_engine_goes_on(family, engine):
    """Every rule has its own test (tests/otprune/vllm/test_fields.py); here some that would fail inside a step."""
    good = family.cases[1]
    rows, ids = good.fields["image_embeds"], good.ids
    malformed = [
        (changed(good, image_embeds=rows[:, :-1]), r"image_embeds must be \[K, \d+\]"),
        (changed(good, image_embeds=rows[:-1]), "image_rows must add up to"),
        (changed(good, image_tokens=good.fields["image_tokens"] + 1), "once for each row"),
        (changed(good, pixel_values=torch.zeros(1)), "image must have the fields"),
        (replace(good, fields=torch.zeros(1, 3, 16, 16)), "must be the fields image_embeds, .*, got Tensor"),  # type: ignore[arg-type]
        (replace(good, ids=[t for t in ids if t != tiny.IMAGE]), "one image token for each picture: 1, got 0"),
        (replace(good, ids=[*ids, tiny.IMAGE]), "one image token for each picture: 1, got 2"),
        (repeated(family.cases[0], 600), "longer than the maximum model length"),
    ]
    for bad, message in malformed:
        with pytest.raises((ValueError, VLLMClientError), match=message):  # ours, and vLLM's own
            ask(engine, [bad])
    text = replace(good, ids=[t for t in ids if t != tiny.IMAGE])
    params = vllm.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (alone,) = engine.generate([{"prompt_token_ids": text.ids}], params, use_tqdm=False)
    assert len(alone.outputs[0].token_ids) == 4
    assert equal(ask(engine, family.cases), family.cases) == 12


def test_the_tower_is_not_loaded(family, engine):
    towers = (
        "visual",
        "vision_tower",
        "multi_modal_projector",
        "vision_model",
        "connector",
    )  # of a loaded one, at least the norms are parameters
    counts = engine.collective_rpc(
        lambda worker: {
            name: sum(weight.numel() for weight in module.parameters())
            for name, module in getattr(worker.model_runner.model, "model", worker.model_runner.model).named_children()
        }
    )
    (count,) = counts
    assert count.get("language_model", count.get("text_model")) > 10_000
    assert [count[name] for name in towers if name in count] in ([0], [0, 0])


def test_a_prefill_in_small_chunks_changes_nothing(tmp_path):
    """Chunks end within spans: each takes its own part of the rows and of every DeepStack level."""
    family = Family("qwen3_vl", tmp_path)
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_prefix_caching": False}
    engine = start(family.folder, own_process=True, **small)
    try:
        outputs = ask(engine, family.cases)
        assert equal(outputs, family.cases) == 12
        assert worst(outputs, family.cases) < CLOSE
    finally:
        stop(engine)


def test_the_installed_package_has_the_entry_point():
    """Installed before the plugin was there, the package lacks it: `make test-vllm` installs it again."""
    assert NAME in {point.name for point in entry_points(group=GROUP)}
    assert is_findable()


JOB = """
import pickle, sys
from pathlib import Path
from otprune.vllm.found import make_findable
from tests.vllm.span_engine import ask, equal, start, stop, worst

if __name__ == "__main__":
    make_findable()
    cases = pickle.loads(Path(sys.argv[2]).read_bytes())
    engine = start(Path(sys.argv[1]), own_process=True)
    outputs = ask(engine, cases)
    print("equal", equal(outputs, cases), worst(outputs, cases))
    stop(engine)
"""


def test_code_that_ray_ships_finds_its_plugin_without_being_installed(tmp_path):
    """In an environment with vLLM and all else, but without the package, from a copy of its code without metadata."""
    import pickle

    family = Family("llava", tmp_path / "checkpoint")
    (tmp_path / "cases").write_bytes(pickle.dumps(family.cases))
    job = tmp_path / "job"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.dist-info")
    shutil.copytree(ROOT / "otprune", job / "otprune", ignore=ignore)
    (job / "tests" / "vllm").mkdir(parents=True)
    for module in ("__init__", "vllm/__init__", "vllm/references", "vllm/span_engine", "vllm/tiny"):
        shutil.copy(ROOT / "tests" / f"{module}.py", job / "tests" / f"{module}.py")
    (job / "job.py").write_text(JOB)
    python = environment_without_the_package(tmp_path)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    command = [str(python), "job.py", str(family.folder), str(tmp_path / "cases")]
    done = subprocess.run(command, cwd=job, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    word, number, difference = done.stdout.splitlines()[-1].split()
    assert (word, number) == ("equal", "12")
    assert float(difference) < CLOSE


def environment_without_the_package(folder: Path) -> Path:
    """The Python of an environment with all packages of vLLM's own except this one."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(vllm.__file__).parents[1].iterdir():
        if "otprune" not in entry.name and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "python", symlinks=True)
    (site,) = (folder / "python").glob("lib/python*/site-packages")
    (site / "all.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    return folder / "python" / "bin" / "python"
