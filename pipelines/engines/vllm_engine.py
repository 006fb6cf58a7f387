"""The record of the engine vLLM: its checks, the arguments that decide its answers, its GPUs, its start-up arguments.

Nothing here imports vLLM: the driver may run on a machine without vLLM. vllm_client.py imports it, in the actor.
"""

import ast
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.keys import NO_RAY, Config
from pipelines.engines.engine import Engine, whole_identity
from pipelines.engines.vllm_client import DEFAULT_MAX_NUM_SEQS
from pipelines.errors import UserError
from pipelines.secrets import is_secret

if TYPE_CHECKING:  # both modules import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place

OURS = {
    **dict.fromkeys(("model", "model_weights", "tokenizer", "hf_config_path"), "model.path"),
    **dict.fromkeys(("revision", "tokenizer_revision"), "model.path"),
    **dict.fromkeys(("enable_mm_embeds", "limit_mm_per_prompt", "language_model_only"), "prune.method"),
    **dict.fromkeys(("enable_prompt_embeds", "skip_tokenizer_init", "runner", "task", "seed"), "the job"),
    **dict.fromkeys(("data_parallel_size", "data_parallel_size_local"), "generate.actors"),
}
"""Engine arguments that the user may not pass, and the key (or part) of the job that sets each."""

UNSAFE = {
    **dict.fromkeys(("trust_remote_code", "code_revision"), "no code of a checkpoint is run"),
    **dict.fromkeys(
        ("default_mm_loras", "weight_transfer_config"),
        "captions would be of weights that the fingerprint does not name",
    ),
}
"""Engine arguments that nobody may pass, at any depth, and why. All others, but `NEUTRAL`, decide the fingerprint."""

SAME_WEIGHTS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""Values of `load_format` that load the safetensors that the fingerprint names; others load what else lies there, some
of it pickled, or random weights."""

OUR_SAMPLING = {
    "max_tokens": "generate.max_new_tokens",
    "temperature": "generate.temperature",
    "top_p": "generate.top_p",
    "seed": "generate.seed",
    "stop_token_ids": "the checkpoint",
    **dict.fromkeys(("n", "detokenize", "output_kind", "logprobs", "prompt_logprobs", "ignore_eos"), "the job"),
}
"""Sampling parameters that the user may not pass, and the key (or part) of the job that sets each."""

NEUTRAL = frozenset(
    (
        *("max_num_seqs", "max_num_batched_tokens", "max_num_partial_prefills", "max_long_partial_prefills"),
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "block_size", "enable_prefix_caching"),
        *("enable_chunked_prefill", "async_scheduling", "scheduling_policy", "mm_processor_cache_gb"),
        *(
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "distributed_executor_backend",
            "disable_custom_all_reduce",
        ),
        *("enforce_eager", "compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"),
        *("download_dir", "max_parallel_loading_workers", "disable_log_stats", "enable_log_requests"),
        *("swap_space", "cpu_offload_gb", "kv_offloading_size"),
    )
)
"""Engine arguments for speed and memory, left out of the fingerprint.

They change an answer no more than another batch size does.
"""

MAX_UNITS_IN_FLIGHT = 16


def check(config: Config) -> None:
    """Refuses a configuration that vLLM cannot run.

    Raises:
        UserError: if an argument is unknown, misplaced or unsafe or has a wrong value, or if this machine is to run
            the job itself (`ray.address` is null or none) and has no vLLM.
    """
    engine = config.engine
    _check_safe("engine.kwargs", engine.kwargs)
    _check_safe("engine.sampling", engine.sampling)
    folder = _vllm_folder()
    if folder is None and config.ray.address in (None, NO_RAY):  # both start the engine on this machine
        raise UserError("engine.name=vllm must find vLLM installed: pip install '.[vllm]' (README.md, vLLM)")
    arguments, sampling = known_names(folder) if folder else (None, None)
    _check_names("engine.kwargs", engine.kwargs, OURS, arguments)
    _check_names("engine.sampling", engine.sampling, OUR_SAMPLING, sampling)
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs", "max_model_len"):
        value = engine.kwargs.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"engine.kwargs.{name} must be an integer of at least 1, got {value!r}")
    gpus = config.generate.num_gpus
    if gpus and num_workers(config) > 1 and gpus != num_workers(config):
        raise UserError(f"generate.num_gpus must be {num_workers(config)}, one for each worker, or null; got {gpus:g}")


def known_names(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the engine's arguments and of the sampling parameters of the vLLM in `folder`.

    The names are parsed from the source: importing vLLM takes long.
    """
    arguments = _fields(folder / "engine" / "arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
    return arguments, _fields(folder / "sampling_params.py", ("SamplingParams",))


def identity(config: Config) -> dict[str, Any]:
    """The arguments that decide the answers, by dotted key."""
    neutral = {f"engine.kwargs.{name}" for name in NEUTRAL}
    if config.engine.kwargs.get("load_format") in SAME_WEIGHTS:
        neutral.add("engine.kwargs.load_format")
    return {name: value for name, value in whole_identity(config).items() if name not in neutral}


def takes_images(config: Config, checkpoint: "Checkpoint") -> bool:
    """Whether vLLM encodes the images: yes for a method that keeps every token, unless the checkpoint has tiles."""
    from otprune.methods import get_method  # imports torch, which a caller that only reads the records must not load

    # Where every token is kept, an encode stage saves nothing. Tiles are cut in the read stage; vLLM would cut again.
    method = get_method(config.prune.method)
    return method.keeps_all and not method.inside_model and not checkpoint.geometry.tiled


def num_workers(config: Config) -> int:
    """Number of GPUs of one engine: the tensor parallel size times the pipeline parallel size."""
    kwargs = config.engine.kwargs
    return kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)


def bundles(config: Config) -> list[dict[str, float]]:
    """One bundle for each worker of an engine that Ray spreads over nodes (`distributed_executor_backend: ray`).

    Empty for any other engine: it lives in its actor, which holds all GPUs of the engine on one node.
    """
    if config.engine.kwargs.get("distributed_executor_backend") != "ray":
        return []
    return [{"GPU": 1.0, "CPU": config.generate.num_cpus} for _ in range(num_workers(config))]


def units_in_flight(config: Config) -> int:
    """Number of units that an actor works on at once.

    The requests of these units fill the engine's slots, and two units more cover the time in which units end.
    """
    if config.engine.units_in_flight is not None:
        return config.engine.units_in_flight
    slots = config.engine.kwargs.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS)
    requests = config.unit.images * (1 + len(config.prompt.more))
    return min(MAX_UNITS_IN_FLIGHT, math.ceil(slots / requests) + 2)


def max_restarts(config: Config) -> int:
    """The value of `engine.max_restarts`."""
    return config.engine.max_restarts


def actor() -> type:
    """The class `VllmGenerator`."""
    from pipelines.engines.vllm_actor import VllmGenerator  # imports torch

    return VllmGenerator


def arguments(config: Config, checkpoint: "Checkpoint", settings: dict[str, Any], place: "Place") -> dict[str, Any]:
    """Keyword arguments of `VllmGenerator`. It takes no `settings`: the encode stage has pruned before it."""
    return {
        "checkpoint": checkpoint,
        "prompt": config.prompt,
        "generate": config.generate,
        "engine": config.engine,
        "images": takes_images(config, checkpoint),
        "place": place,
    }


def _vllm_folder() -> Path | None:
    """The folder of the vllm package, or None if it is not installed. Does not import vLLM."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec and spec.origin else None


def _fields(file: Path, classes: Iterable[str]) -> set[str]:
    """Names of the annotated fields of these classes in a Python source file."""
    tree = ast.parse(file.read_text())
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    statements = [statement for body in bodies for statement in body if isinstance(statement, ast.AnnAssign)]
    return {statement.target.id for statement in statements if isinstance(statement.target, ast.Name)}


def _check_safe(key: str, arguments: Mapping[str, Any]) -> None:
    """Refuses what runs code, what loads other weights, and secrets: vLLM writes its arguments to its log."""
    for name, value in arguments.items():
        here = f"{key}.{name}"
        if value and name in UNSAFE:
            raise UserError(f"{here} must not be set: {UNSAFE[name]}")
        if name == "load_format" and value not in SAME_WEIGHTS:
            raise UserError(f"{here} must be one of {', '.join(SAME_WEIGHTS)}, got {value!r}")
        if isinstance(value, str) and is_secret(name):
            raise UserError(f"{here} must not be set: secrets go into the environment of every node, such as HF_TOKEN")
        if isinstance(value, Mapping):
            _check_safe(here, value)


def _check_names(key: str, arguments: Mapping[str, Any], ours: Mapping[str, str], known: set[str] | None) -> None:
    """Refuses arguments of the configuration key `key` that the job sets itself or that are not `known` to vLLM."""
    for name in arguments:
        if name in ours:
            raise UserError(f"{key} must not hold {name}, which follows from {ours[name]}")
        if known and name not in known:
            similar = difflib.get_close_matches(name, sorted(known - set(ours)), n=1, cutoff=0.5)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise UserError(f"{key} must hold what the installed vLLM knows, got {name}{hint}")


ENGINE = Engine(
    name="vllm",
    check=check,
    identity=identity,
    takes_images=takes_images,
    num_workers=num_workers,
    bundles=bundles,
    units_in_flight=units_in_flight,
    max_restarts=max_restarts,
    actor=actor,
    arguments=arguments,
)
