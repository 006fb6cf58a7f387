"""What a job checks of its engine before anything starts, what of it decides captions, and what it asks Ray for."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from otprune.families import Options
from otprune.families.llava_next import Tiled
from otprune.methods import METHODS
from otprune.models import Checkpoint, read_checkpoint
from pipelines.config.keys import Config, EngineConfig
from pipelines.config.load import load_config
from pipelines.engines.engine import Engine, collect
from pipelines.engines.registry import ENGINES, check_engine, get_engine, identity
from pipelines.engines.vllm_client import engine_arguments
from pipelines.engines.vllm_engine import known_names
from pipelines.errors import UserError
from pipelines.output.fingerprint import fingerprint
from pipelines.run.cluster import check_room
from pipelines.run.describe import describe
from pipelines.run.job import prepare
from pipelines.run.placement import PlacementGroups, Stage, num_pairs, placers
from pipelines.run.resources import actor_cpus, actor_gpus, gpus_needed
from pipelines.run.stages import make_stages, place_of
from tests.helpers import DEMO, REPOSITORY

VLLM = "engine.name=vllm"
FIELDS = ("max_num_seqs", "max_model_len", "quantization", "model", "tensor_parallel_size")


def configured(*arguments: str) -> Config:
    return load_config([*DEMO, *arguments])


@pytest.fixture(scope="module")
def checkpoint(demo_model) -> Checkpoint:
    return read_checkpoint(str(demo_model))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> Path:
    """A package that declares a few of vLLM's names as vLLM does."""
    folder = tmp_path / "site" / "vllm"
    (folder / "engine").mkdir(parents=True)
    (folder / "__init__.py").touch()
    fields = "\n".join(f"    {name}: int = 1" for name in FIELDS)
    (folder / "engine" / "arg_utils.py").write_text(
        f"class EngineArgs:\n{fields}\nclass AsyncEngineArgs(EngineArgs):\n    enable_log_requests: bool = False\n"
    )
    (folder / "sampling_params.py").write_text("class SamplingParams:\n    top_k: int = 0\n    stop: str = ''\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        check_engine(configured(*arguments))
    return str(error.value)


def test_names_are_read_from_the_source_without_importing_it(installed):
    arguments, sampling = known_names(installed)
    assert arguments == {*FIELDS, "enable_log_requests"}
    assert sampling == {"top_k", "stop"}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.inside_model])
def test_methods_inside_the_language_model_are_refused_with_the_reason(installed, method):
    told = refused(VLLM, f"prune.method={method}")
    assert told.startswith(f"engine.name must be transformers with prune.method={method}, got vllm: the method deletes")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.inside_model])
def test_all_other_methods_are_taken(installed, method):
    check_engine(configured(VLLM, f"prune.method={method}"))


def test_unknown_misplaced_and_useless_arguments_are_refused(installed):
    assert refused(VLLM, "engine.kwargs.max_nun_seqs=3").endswith("got max_nun_seqs; did you mean max_num_seqs?")
    assert refused(VLLM, "engine.kwargs.model=x").endswith("must not hold model, which follows from model.path")
    assert refused(VLLM, "engine.sampling.temperature=1").endswith("which follows from generate.temperature")
    assert refused(VLLM, "engine.kwargs.max_num_seqs=0") == (
        "engine.kwargs.max_num_seqs must be an integer of at least 1, got 0"
    )
    none = "must be empty with engine.name=transformers, which takes none"
    assert refused("engine.kwargs.max_num_seqs=3") == f"engine.kwargs {none}; got max_num_seqs"
    assert refused("engine.sampling.top_k=3") == f"engine.sampling {none}; got top_k"


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("trust_remote_code=true", "trust_remote_code must not be set: no code of a checkpoint is run"),
        ("speculative_config={trust_remote_code: true}", "speculative_config.trust_remote_code must not be set"),
        ("default_mm_loras={image: x}", "default_mm_loras must not be set: captions would be of weights that"),
        ("load_format=dummy", "load_format must be one of auto, hf, safetensors,"),
        ("load_format=pt", "load_format must be one of auto, hf, safetensors,"),
        ("revision=main", "must not hold revision, which follows from model.path"),
        ("hf_token=hf_hunter2", "hf_token must not be set: secrets go into the environment of every node"),
        ("model_loader_extra_config={aws: {secret_key: hunter2}}", "aws.secret_key must not be set: secrets go"),
    ],
)
def test_code_other_weights_and_secrets_are_no_arguments(installed, argument, told):
    text = refused(VLLM, f"engine.kwargs.{argument}")
    assert told in text
    assert "hunter2" not in text


def test_an_unknown_engine_is_named_beside_those_that_are_known():
    assert refused("engine.name=tgi") == "engine.name must be one of transformers, vllm, got 'tgi'"
    meaning = next(key.metadata["meaning"] for key in fields(EngineConfig) if key.name == "name")
    assert all(name in meaning for name in ENGINES), "--help has no engine to choose from"


def test_two_engines_of_one_name_are_refused():
    with pytest.raises(ValueError, match="must have different names, got vllm, vllm"):
        collect(ENGINES["vllm"], ENGINES["vllm"])


def test_the_records_import_neither_torch_nor_an_engine():
    code = "import sys, pipelines.engines.registry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm", "ray"} & set(done.stdout.split())


class Parrot:
    """An actor that says what it was made with."""

    def __init__(self, words: str, kept: int):
        self.words, self.kept = words, kept


def test_a_third_engine_is_one_record(monkeypatch, tmp_path, scene_parquet):
    """Its check, its part of the fingerprint, its resources and its stage, with nothing else told."""

    def check(config: Config) -> None:
        if config.engine.sampling.get("words") == "rude":
            raise UserError("engine.sampling.words must be polite")

    parrot = Engine(
        name="parrot",
        check=check,
        actor=lambda: Parrot,
        arguments=lambda config, checkpoint, settings, place: {
            "words": config.engine.sampling["words"],
            "kept": checkpoint.geometry.fixed,
        },
        takes_images=lambda config, checkpoint: config.prune.method == "none",
        num_workers=lambda config: 2,
        units_in_flight=lambda config: 5,
        max_restarts=lambda config: 1,
    )
    monkeypatch.setitem(ENGINES, "parrot", parrot)
    corpus = scene_parquet(tmp_path / "in" / "a.parquet", 4)
    paths = (f"input.path={corpus}", f"output.path={tmp_path / 'out'}")
    chosen = ("engine.name=parrot", "engine.sampling.words=hello", *paths)
    assert refused("engine.name=parrot", "engine.sampling.words=rude") == "engine.sampling.words must be polite"
    assert "must be transformers with prune.method=fastv, got parrot" in refused(*chosen, "prune.method=fastv")
    assert "one of transformers, vllm, parrot, got 'tgi'" in refused("engine.name=tgi")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    job = prepare(configured(*chosen, "prune.method=none"))
    assert (job.described["engine.name"], job.described["engine.sampling.words"]) == ("parrot", "hello")
    stages = make_stages(job)
    assert stages.encode is None
    made = stages.generate
    assert (made.actor, made.arguments) == (Parrot, {"words": "hello", "kept": 256})
    assert (made.num_gpus, made.units_at_once, made.bundles) == (2.0, 5, [])
    pruned = make_stages(prepare(configured(*chosen, f"output.path={tmp_path / 'pruned'}")))
    assert pruned.encode is not None


def test_without_vllm_the_job_does_not_start_unless_a_cluster_may_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "must find vLLM installed" in refused(VLLM)
    assert "must find vLLM installed" in refused(VLLM, "ray.address=none")
    check_engine(configured(VLLM, "ray.address=ray://head:10001", "engine.kwargs.anything=1"))


def test_a_refusal_comes_before_anything_is_written(installed, tmp_path):
    with pytest.raises(UserError, match="fastv"):
        prepare(configured(VLLM, "prune.method=fastv", f"output.path={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_what_decides_captions_is_in_the_fingerprint_and_what_is_speed_is_not(checkpoint):
    def marked(*arguments: str) -> str:
        return fingerprint(describe(configured(*arguments), checkpoint))

    plain = marked(VLLM)
    assert plain != marked()
    assert marked(VLLM, "engine.kwargs.quantization=fp8") != plain
    assert marked(VLLM, "engine.kwargs.kv_cache_dtype=fp8") != plain
    assert marked(VLLM, "engine.sampling.top_k=5") != plain
    faster = ("engine.kwargs.max_num_seqs=512", "engine.kwargs.tensor_parallel_size=4", "engine.timeout_seconds=9")
    assert marked(VLLM, *faster, "engine.max_restarts=1", "engine.units_in_flight=2") == plain
    assert "engine.kwargs.quantization" in identity(configured(VLLM, "engine.kwargs.quantization=fp8"))
    assert marked(VLLM, "engine.kwargs.load_format=runai_streamer") == plain, "the same weights, read otherwise"
    for secret in ("engine.kwargs.hf_token=hunter2", "engine.kwargs.load_extra={s3: {secret_key: hunter2}}"):
        deciding = describe(configured(VLLM, secret), checkpoint)
        assert deciding == describe(configured(VLLM, secret.replace("hunter2", "changed")), checkpoint)
        assert "hunter2" not in str(deciding)
    other = ("load_format=dummy", "hf_overrides={rope_theta: 5}", "trust_remote_code=true")
    assert len({marked(VLLM, f"engine.kwargs.{each}") for each in other} | {plain}) == 4


def test_engine_arguments_follow_from_the_job_and_yield_to_the_user(checkpoint):
    def arguments(*given: str, num_gpus: float, images: bool = False) -> dict[str, Any]:
        config = configured(VLLM, *given)
        return engine_arguments(config.engine, checkpoint, images, place_of(config, num_gpus))

    pruned = arguments(num_gpus=0)
    assert (pruned["limit_mm_per_prompt"], pruned["enable_mm_embeds"]) == ({"image": 0, "video": 0}, True)
    assert pruned["hf_overrides"] == {"architectures": ["SpanLlavaForConditionalGeneration"]}
    assert (pruned["dtype"], pruned["enforce_eager"]) == ("float32", True)
    images = arguments(num_gpus=1, images=True)
    assert images["dtype"] == "bfloat16"  # whatever the checkpoint was saved in
    assert images["limit_mm_per_prompt"]["image"] > 0
    assert images["limit_mm_per_prompt"]["video"] == 0
    assert not {"enable_mm_embeds", "hf_overrides", "mm_processor_kwargs"} & set(images)
    assert "gpu_memory_utilization" not in images
    assert arguments(num_gpus=0.7)["gpu_memory_utilization"] == 0.7
    given = ("engine.kwargs.gpu_memory_utilization=0.5", "engine.kwargs.dtype=float16")
    assert arguments(*given, num_gpus=0.7)["gpu_memory_utilization"] == 0.5
    assert arguments(*given, num_gpus=0)["dtype"] == "float16"
    given = "engine.kwargs.hf_overrides={rope_theta: 5}"
    assert arguments(given, num_gpus=0)["hf_overrides"] == pruned["hf_overrides"] | {"rope_theta": 5}


def test_pictures_that_have_their_size_are_not_resized_again(checkpoint):
    config = configured(VLLM)
    sized = replace(checkpoint, options=Options(max_pixels=90_000, min_pixels=3_136))
    images = engine_arguments(config.engine, sized, True, place_of(config, 0))
    # No picture that vLLM gets is to be resized by it again: none is below the one or above the other.
    assert images["mm_processor_kwargs"] == {"min_pixels": 1, "max_pixels": checkpoint.geometry.most_bytes // 3}
    assert "mm_processor_kwargs" not in engine_arguments(config.engine, sized, False, place_of(config, 0))


def test_as_many_units_are_at_hand_as_keep_the_slots_busy():
    def units_in_flight(config: Config) -> int:
        return get_engine(config).units_in_flight(config)

    assert units_in_flight(configured()) == 1
    assert units_in_flight(configured(VLLM, "unit.images=128")) == 4  # two hold 256 requests
    assert units_in_flight(configured(VLLM, "unit.images=128", "engine.kwargs.max_num_seqs=512")) == 6
    assert units_in_flight(configured(VLLM, "unit.images=128", "prompt.more=[a,b,c]")) == 3
    assert units_in_flight(configured(VLLM, "unit.images=1")) == 16
    assert units_in_flight(configured(VLLM, "engine.units_in_flight=7")) == 7


@pytest.fixture
def gpus(monkeypatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 8.0})


@pytest.mark.usefixtures("gpus")
def test_an_engine_of_several_gpus_asks_for_as_many(installed, checkpoint):
    def gpus_of(*arguments: str) -> tuple[float, float]:
        return actor_gpus(configured(VLLM, *arguments), checkpoint)

    four = "engine.kwargs.tensor_parallel_size=4"
    assert gpus_of() == (0.3, 0.7)
    assert gpus_of(four) == (0.3, 4.0)
    assert gpus_of(four, "engine.kwargs.pipeline_parallel_size=2") == (0.3, 8.0)
    assert gpus_of("prune.method=none") == (0.0, 1.0)  # no encode stage
    assert refused(VLLM, four, "generate.num_gpus=2").startswith("generate.num_gpus must be 4, one for each worker")


def test_without_an_encode_stage_its_actors_take_no_room(checkpoint):
    several = ("encode.actors=3", "generate.actors=2")
    assert actor_cpus(configured(VLLM, *several), checkpoint) == 5
    unpruned = configured(VLLM, "prune.method=none", *several)
    assert actor_cpus(unpruned, checkpoint) == 2
    tiled = replace(checkpoint, geometry=Tiled(side=224, grid_side=16, resolutions=((224, 448),), background=(0, 0, 0)))
    assert actor_cpus(unpruned, tiled) == 5, "vLLM would cut the tiles again"
    assert actor_cpus(unpruned, None) == 5, "nobody knows yet"


def test_an_engine_that_ray_spreads_gets_a_bundle_for_each_worker():
    assert ENGINES["vllm"].bundles(configured(VLLM, "engine.kwargs.tensor_parallel_size=2")) == []
    spread = ("engine.kwargs.tensor_parallel_size=2", "engine.kwargs.distributed_executor_backend=ray")
    assert ENGINES["vllm"].bundles(configured(VLLM, *spread)) == [{"GPU": 1.0, "CPU": 1.0}] * 2


@pytest.mark.usefixtures("gpus")
def test_an_engine_with_a_placement_group_takes_a_whole_gpu_even_for_one_worker(checkpoint):
    assert actor_gpus(configured(VLLM, "engine.kwargs.distributed_executor_backend=ray"), checkpoint) == (0.3, 1.0)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("actors", "shares", "needed"),
    [
        ((1, 1), (0.3, 0.7), 1),
        ((2, 2), (0.3, 0.7), 2),
        ((2, 8), (0.2, 0.8), 8),
        ((4, 1), (0.3, 0.7), 2),  # three more encoders share a second one
        ((2, 2), (0.5, 0.7), 3),  # both encoders on one
        ((3, 3), (0.2, 0.2), 2),
        ((1, 2), (0.5, 4.0), 9),
        ((2, 2), (0.0, 1.0), 2),
    ],
)
def test_shares_that_do_not_fit_one_gpu_together_need_another(actors, shares, needed):
    pools = (f"encode.actors={actors[0]}", f"generate.actors={actors[1]}")
    config = configured(*pools, f"encode.num_gpus={shares[0]}", f"generate.num_gpus={shares[1]}")
    assert gpus_needed(config, None) == needed
    check_room(config, None, {"CPU": 99, "GPU": needed}, may_grow=False)
    with pytest.raises(UserError, match=f"need {needed} GPUs, the cluster has {needed - 1}"):
        check_room(config, None, {"CPU": 99, "GPU": needed - 1}, may_grow=False)


def stage(**more) -> Stage:
    return Stage(actor=object, arguments={}, min_actors=2, max_actors=4, num_cpus=1, num_gpus=4, **more)


def test_a_stage_asks_for_its_gpus_and_keeps_one_unit_waiting():
    asked = stage(units_at_once=4).remote(100, 2, False, None)
    assert (asked["num_gpus"], asked["num_cpus"], asked["max_task_retries"]) == (4, 1, 2)
    pool = asked["compute"]
    assert (pool.max_concurrent_calls_per_actor, pool.max_tasks_in_flight_per_actor) == (4, 5)
    assert (pool.min_size, pool.max_size) == (2, 4)
    alone = stage(units_at_once=4).remote(1, 2, True, None)["compute"]
    assert (alone.max_concurrent_calls_per_actor, alone.max_tasks_in_flight_per_actor, alone.max_size) == (1, 1, 1)


@pytest.mark.usefixtures("ray_session")
def test_each_actor_of_several_bundles_gets_a_placement_group_that_is_given_back():
    groups = PlacementGroups()
    placed = stage(bundles=({"CPU": 1.0},) * 2)
    none, place = placers(None, placed, 100, groups)
    of_kind = stage(bundles=({"CPU": 1.0},), accelerator="H100")
    assert of_kind.all_bundles() == [{"CPU": 1.0, "accelerator_type:H100": 0.001}], "else no bundle would fit the actor"
    asked = placed.remote(100, 2, False, place)
    assert none is None
    assert asked["num_gpus"] == 0
    before = ray.available_resources()["CPU"]
    strategy = asked["ray_remote_args_fn"]()["scheduling_strategy"]
    assert strategy.placement_group_capture_child_tasks
    ray.get(strategy.placement_group.ready(), timeout=60)
    assert strategy.placement_group.bundle_specs == [{"CPU": 1.0}] * 2
    groups.remove()
    for _ in range(100):
        if ray.available_resources().get("CPU") == before:
            return
        ray.get(ray.remote(num_cpus=0)(lambda: None).remote())
    pytest.fail(f"the placement group still holds its CPUs: {ray.available_resources()}")


ON_TWO_GPUS = """
import os, sys
import ray
from pipelines.run.flow import Stage, run_flow
from pipelines.stages.read import SpanRow

class Says:
    def __init__(self, name):
        self.name, self.gpus = name, os.environ["CUDA_VISIBLE_DEVICES"]

    def __call__(self, row):
        import time

        time.sleep(0.2)
        return {**row, self.name: f"{os.getpid()} on {self.gpus}"}

def read(row):
    yield from ({"unit": i} for i in range(24))

def stage(name, share):
    pool = {"min_actors": 2, "max_actors": 2, "num_cpus": 0.5}
    return Stage(actor=Says, arguments={"name": name}, num_gpus=share, **pool)

class Span:
    units = tuple(range(24))

    def to_row(self):
        return {"span": 0}

ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
stages = {"read": read, "encode": stage("encode", 0.3), "generate": stage("generate", 0.7), "sink": lambda row: row}
rows = list(run_flow([Span()], **stages, retries=0, max_lost=0, no_progress_seconds=60))
assert len(rows) == 24
for name in ("encode", "generate"):
    print(name, sorted({row[name].partition(" on ")[2] for row in rows}))
print("left", {group["state"] for group in ray.util.placement_group_table().values()})
"""


@pytest.mark.slow
def test_actors_that_share_gpus_come_in_pairs_and_all_start():
    """With what Ray makes of 0.3 and 0.7 by itself, the second generator would never start."""
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_GPUS], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "encode ['0', '1']\ngenerate ['0', '1']\nleft {'REMOVED'}" in done.stdout


def test_only_pools_of_fixed_size_and_one_kind_of_gpu_are_paired():
    def pool(share: float, **more: Any) -> Stage:
        fixed: dict[str, Any] = {"actor": object, "arguments": {}, "min_actors": 2, "max_actors": 2, "num_cpus": 1}
        return Stage(**fixed | more, num_gpus=share)

    assert num_pairs(pool(0.3), pool(0.7, min_actors=3, max_actors=3), 100) == 2
    assert num_pairs(pool(0.3), pool(0.7), 1) == 1
    assert num_pairs(pool(0.5), pool(0.7), 100) == 0
    assert num_pairs(pool(0.0), pool(0.7), 100) == 0
    assert num_pairs(pool(0.3), pool(0.7, max_actors=4), 100) == 0
    assert num_pairs(pool(0.3, accelerator="L4"), pool(0.7), 100) == 0
    assert num_pairs(None, pool(1.0), 100) == 0
