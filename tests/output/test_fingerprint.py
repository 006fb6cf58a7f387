"""The fingerprint: everything that decides what a caption says and nothing else; an output never mixes two."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

import otprune
from otprune.models import Checkpoint, read_checkpoint
from pipelines.config.keys import Config
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.output.fingerprint import FILE, claim_output, fingerprint, read_claim
from pipelines.run.describe import describe
from pipelines.run.job import check_model
from pipelines.store import Store
from tests.helpers import DEMO

# A key is on one of these two lists, or this file fails: whoever adds a key decides whether it changes captions.
DECIDES = {
    "input.image_column",
    "input.id_column",
    "model.path",
    "model.dtype",
    "model.max_pixels",
    "model.min_pixels",
    "model.max_tiles",
    "model.original_tiles",
    "prompt.template",
    "prompt.more",
    "prompt.system",
    "prompt.conversation",
    "prune.method",
    "prune.retention",
    "prune.shrink",
    "prune.merge",
    "prune.gamma",
    "prune.gamma_scale",
    "prune.seed",
    "prune.per_tile",
    "prune.settings",
    "decode.aspect",
    "decode.color_profiles",
    "decode.max_bytes",
    "decode.max_pixels",
    "decode.min_side",
    "decode.more_formats",
    "generate.max_new_tokens",
    "generate.temperature",
    "generate.top_p",
    "generate.seed",
    "generate.retries",
    "generate.retry_cut",
    "engine.name",
    "engine.kwargs",
    "engine.sampling",
}
DOES_NOT = {
    "input.path",
    "input.format",
    "input.cache",
    "input.reference_column",
    "input.limit",
    "input.on_changed",
    "input.endpoint_url",
    "input.anonymous",
    "input.fetch_threads",
    "input.fetch_per_host",
    "input.fetch_timeout",
    "input.fetch_retries",
    "input.allow_private",
    "input.allow_paths",
    "unit.images",
    "generate.batch_size",
    "generate.accelerator",
    "generate.actors",
    "generate.max_actors",
    "generate.num_gpus",
    "generate.num_cpus",
    "engine.units_in_flight",
    "engine.timeout_seconds",
    "engine.max_restarts",
}
DOES_NOT_SECTIONS = {"output", "encode", "faults", "cost", "budget", "mlflow", "ray", "run"}
DOES_NOT_SECTIONS |= {"gate", "estimate", "quality"}


DEMO_DESCRIBED = {
    "decode.aspect": "crop",
    "decode.color_profiles": True,
    "decode.max_bytes": 67108864,
    "decode.max_pixels": 100000000,
    "decode.min_side": 2,
    "decode.more_formats": [],
    "engine.name": "transformers",
    "generate.max_new_tokens": 48,
    "generate.retries": 3,
    "generate.seed": 0,
    "generate.temperature": 0.0,
    "generate.top_p": 1.0,
    "input.id_column": "auto",
    "input.image_column": "auto",
    "model.dtype": "auto",
    "prompt.conversation": "auto",
    "prompt.more": [],
    "prompt.template": "describe the image .",
    "prune.gamma": 0.5,
    "prune.gamma_scale": "trace",
    "prune.method": "otprune",
    "prune.per_tile": False,
    "prune.retention": 0.098,
    "prune.seed": 0,
    "prune.settings": {},
    "version": otprune.__version__,
}
"""Of conf/demo.yaml, beside the model's path and weights."""


def another(value: object) -> object:
    """A different value of the same kind; types do not matter to a fingerprint."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {**value, "x": 1}
    return value + 1 if isinstance(value, (int, float)) else [*value, "x"] if isinstance(value, list) else f"{value}x"


def changed(name: str) -> Config:
    section, leaf = name.split(".")
    part = getattr(Config(), section)
    value = "vllm" if name == "engine.name" else another(getattr(part, leaf))  # an engine must be a known one
    return replace(Config(), **{section: replace(part, **{leaf: value})})


@pytest.fixture(scope="module")
def checkpoint(demo_model) -> Checkpoint:
    return read_checkpoint(str(demo_model))


@pytest.mark.parametrize("name", sorted(Config().dotted()))
def test_every_key_either_decides_what_a_caption_says_or_does_not(checkpoint, name):
    section = name.split(".")[0]
    assert (name in DECIDES) + (name in DOES_NOT) + (section in DOES_NOT_SECTIONS) == 1
    same = fingerprint(describe(changed(name), checkpoint)) == fingerprint(describe(Config(), checkpoint))
    assert same == (name not in DECIDES)


def test_the_demos_fingerprint_stands_for_these_keys_and_values(checkpoint):
    """Outputs resume only while their keys and values stay as they are."""
    path, arguments = str(checkpoint.path), ("engine.name=vllm", "engine.kwargs.max_num_seqs=4", "engine.kwargs.a=1")
    assert described_of(checkpoint) == DEMO_DESCRIBED | {"model.path": path, "model.weights": checkpoint.digest}
    with_vllm = {"engine.name": "vllm", "engine.kwargs.a": 1, "engine.sampling.top_k": 5}
    assert described_of(checkpoint, *arguments, "engine.sampling.top_k=5") == described_of(checkpoint) | with_vllm


def described_of(checkpoint: Checkpoint, *arguments: str) -> dict:
    return describe(load_config([*DEMO, *arguments]), checkpoint)


def test_null_keys_stand_for_the_models_own_values(checkpoint):
    """Outputs from before a key could be null, or before it existed, are resumed with the same fingerprint."""
    paths = ("input.path=in", "output.path=out", "prune.retention=null", "decode.aspect=auto")
    config, checkpoint = check_model(load_config([*DEMO, *paths]))
    assert (config.prune.share, config.decode.aspect) == (0.098, "pad")
    named = ("prune.retention=0.098", "decode.aspect=pad")
    assert describe(config, checkpoint) == described_of(checkpoint, *named)
    unset = {"model.max_pixels", "model.min_pixels", "model.max_tiles", "model.original_tiles", "prompt.system"}
    unset |= {"prune.shrink", "prune.merge"}
    assert not unset & describe(config, checkpoint).keys()


def test_the_lists_above_name_sections_that_exist():
    assert {name.split(".")[0] for name in DECIDES | DOES_NOT} <= {section.name for section in fields(Config)}


def mark_of(config: Config, model: Path) -> str:
    return fingerprint(describe(config, read_checkpoint(str(model))))


def test_weights_and_version_count(demo_model, tmp_path, monkeypatch):
    before = mark_of(Config(), demo_model)
    copy = shutil.copytree(demo_model, tmp_path / "copy")
    assert mark_of(Config(), copy) == before
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1] + b"\x01")
    assert mark_of(Config(), copy) != before
    monkeypatch.setattr(otprune, "__version__", "99")
    assert mark_of(Config(), demo_model) != before


def test_so_do_the_weights_of_the_clip_that_a_method_reads(demo_model, tmp_path):
    clip = shutil.copytree(demo_model.parent / "clip", tmp_path / "clip")
    config = replace(Config(), prune=replace(Config().prune, method="cdpruner", settings={"clip": str(clip)}))
    before = mark_of(config, demo_model)
    (clip / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:-1] + b"\x01")
    assert mark_of(config, demo_model) != before


def test_the_order_of_keys_does_not_matter():
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert len(fingerprint({})) == 16


# Outputs


@pytest.fixture
def output(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


MINE = {"prune.retention": 0.1, "model.path": "m", "version": "1"}
OTHER = {"prune.retention": 0.2, "model.path": "m", "prompt.template": "new"}


def test_a_fresh_output_is_claimed_and_stays_claimed(output):
    assert claim_output(output, MINE, "refuse") == output
    assert json.loads(output.read(FILE)) == MINE == read_claim(output)
    output.write("captions/part-0.parquet", b"")
    assert claim_output(output, dict(reversed(MINE.items())), "refuse") == output


@pytest.mark.parametrize("folder", ["captions", "predictions"])
def test_another_configuration_is_refused_with_the_keys_that_differ(output, folder):
    claim_output(output, MINE, "refuse")
    output.write(f"{folder}/part-0.parquet", b"")
    with pytest.raises(UserError) as caught:
        claim_output(output, OTHER, "refuse")
    text = str(caught.value)
    assert "prune.retention (0.1 there, 0.2 here)" in text
    assert "prompt.template (None there, 'new' here)" in text
    assert "version ('1' there, None here)" in text
    assert "model.path" not in text
    assert read_claim(output) == MINE


def test_an_output_without_captions_may_change_its_configuration(output):
    claim_output(output, MINE, "refuse")
    claim_output(output, OTHER, "refuse")
    assert read_claim(output) == OTHER


def test_on_mismatch_new_goes_to_the_same_sibling_every_time(output):
    claim_output(output, MINE, "refuse")
    output.write("captions/part-0.parquet", b"")
    sibling = claim_output(output, OTHER, "new")
    assert sibling.path == f"{output.path}-{fingerprint(OTHER)[:8]}"
    sibling.write("captions/part-0.parquet", b"")
    assert claim_output(output, OTHER, "new") == sibling
    assert (read_claim(output), read_claim(sibling)) == (MINE, OTHER)
    assert claim_output(output, MINE, "new") == output


def test_captions_of_unknown_origin_are_refused(output):
    output.write("captions/part-0.parquet", b"")
    for on_mismatch in ("refuse", "new"):
        with pytest.raises(UserError, match=r"holds captions but no fingerprint\.json"):
            claim_output(output, MINE, on_mismatch)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xff", b"[]", b"null"])
def test_a_damaged_claim_is_one_clear_line(output, content):
    output.write(FILE, content)
    with pytest.raises(UserError, match=r"fingerprint\.json must be (a )?JSON"):
        claim_output(output, MINE, "refuse")
