"""vLLM as an engine: what it takes, what decides its answers, the GPUs it asks for, the arguments that it starts with.

Nothing here imports vLLM: the driver may run where it is not installed. vllm_client.py does, in the actor.
"""

import ast
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.keys import Config, EngineConfig
from pipelines.engines.engine import Engine, whole_identity
from pipelines.errors import UserError

if TYPE_CHECKING:  # both import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place

OURS = {
    **dict.fromkeys(("model", "tokenizer", "hf_config_path"), "model.path"),
    **dict.fromkeys(("enable_mm_embeds", "limit_mm_per_prompt", "language_model_only"), "prune.method"),
    **dict.fromkeys(("enable_prompt_embeds", "skip_tokenizer_init", "runner", "task", "seed"), "the job"),
    **dict.fromkeys(("data_parallel_size", "data_parallel_size_local"), "generate.actors"),
}
"""Engine arguments that follow from elsewhere."""

OUR_SAMPLING = {
    "max_tokens": "generate.max_new_tokens",
    "temperature": "generate.temperature",
    "top_p": "generate.top_p",
    "seed": "generate.seed",
    "stop_token_ids": "the checkpoint",
    **dict.fromkeys(("n", "detokenize", "output_kind", "logprobs", "prompt_logprobs", "ignore_eos"), "the job"),
}
"""Sampling parameters that follow from elsewhere."""

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
        *("load_format", "download_dir", "max_parallel_loading_workers", "disable_log_stats", "enable_log_requests"),
        *("swap_space", "cpu_offload_gb", "kv_offloading_size"),
    )
)
"""Engine arguments about speed and memory: they change an answer no more than another batch size does."""

MAX_PICTURES = 8  # of one prompt; benchmarks ask about up to seven
MAX_UNITS_IN_FLIGHT = 16
DEFAULT_MAX_NUM_SEQS = 256


def check(config: Config) -> None:
    """Refuses what vLLM cannot do.

    Raises:
        UserError: an unknown or a misplaced argument, or no vLLM on this machine, which is to run the job itself.
    """
    engine = config.engine
    folder = _installed()
    if folder is None and config.ray.address in (None, "none"):  # both start the engine on this machine
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
    """Names of the engine's arguments and of the sampling parameters, by vLLM's source: importing it takes long."""
    arguments = _fields(folder / "engine" / "arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
    return arguments, _fields(folder / "sampling_params.py", ("SamplingParams",))


def identity(config: Config) -> dict[str, Any]:
    """The arguments that decide the answers, by dotted key."""
    neutral = {f"engine.kwargs.{name}" for name in NEUTRAL}
    return {name: value for name, value in whole_identity(config).items() if name not in neutral}


def takes_images(config: Config, checkpoint: "Checkpoint") -> bool:
    """Unpruned, nothing is gained by encoding elsewhere; tiles are cut already, and vLLM would cut them again."""
    from otprune.methods import UNPRUNED  # imports torch, which nobody needs who only looks at the records

    return config.prune.method == UNPRUNED and not checkpoint.has_tiles


def num_workers(config: Config) -> int:
    """GPUs of one engine where there are any: tensor parallel times pipeline parallel."""
    kwargs = config.engine.kwargs
    return kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)


def bundles(config: Config) -> list[dict[str, float]]:
    """Bundles of an engine that Ray spreads over nodes (`distributed_executor_backend: ray`); empty for all others.

    Any other engine lives in its actor, which holds all its GPUs on one node.
    """
    if config.engine.kwargs.get("distributed_executor_backend") != "ray":
        return []
    return [{"GPU": 1.0, "CPU": config.generate.num_cpus} for _ in range(num_workers(config))]


def units_in_flight(config: Config) -> int:
    """Units an actor works on at once: enough requests for the engine's slots while others come to their end."""
    if config.engine.units_in_flight is not None:
        return config.engine.units_in_flight
    slots = config.engine.kwargs.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS)
    requests = config.unit.images * (1 + len(config.prompt.more))
    return min(MAX_UNITS_IN_FLIGHT, math.ceil(slots / requests) + 2)


def max_restarts(config: Config) -> int:
    return config.engine.max_restarts


def actor() -> type:
    from pipelines.engines.vllm_actor import VllmGenerator  # imports torch

    return VllmGenerator


def arguments(config: Config, checkpoint: "Checkpoint", settings: dict[str, Any], place: "Place") -> dict[str, Any]:
    """Of `VllmGenerator`; what is left of each image is chosen before it, so the method's settings are not its own."""
    return {
        "checkpoint": checkpoint,
        "conversation": config.prompt.conversation,
        "generate": config.generate,
        "engine": config.engine,
        "images": takes_images(config, checkpoint),
        "place": place,
    }


def engine_arguments(engine: EngineConfig, images: bool, place: "Place") -> dict[str, Any]:
    """Arguments of vLLM's engine: what follows from the job, under what `engine.kwargs` says.

    With `images` it encodes images itself, else it gets visual tokens.
    """
    arguments: dict[str, Any] = {
        "max_num_seqs": DEFAULT_MAX_NUM_SEQS,
        "mm_processor_cache_gb": 0,  # no image comes twice
        "disable_log_stats": True,
        # Without a place for images the vision tower is not loaded; the encode stage holds it.
        "limit_mm_per_prompt": {"image": MAX_PICTURES if images else 0},
        "enable_mm_embeds": not images,
        # As our own actors have it; left to itself, vLLM takes what the checkpoint was saved in.
        "dtype": str(place.torch_dtype).removeprefix("torch."),
    }
    if place.device == "cpu":
        arguments["enforce_eager"] = True  # on a CPU, compiling takes longer than it saves
    elif place.gpu_share < 1:
        arguments["gpu_memory_utilization"] = round(min(0.9, place.gpu_share), 2)  # the rest is the encoder's
    return arguments | engine.kwargs


def _installed() -> Path | None:
    """The folder of the vllm package, without importing it."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec and spec.origin else None


def _fields(file: Path, classes: Iterable[str]) -> set[str]:
    tree = ast.parse(file.read_text())
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    statements = [statement for body in bodies for statement in body if isinstance(statement, ast.AnnAssign)]
    return {statement.target.id for statement in statements if isinstance(statement.target, ast.Name)}


def _check_names(key: str, given: Mapping[str, Any], ours: Mapping[str, str], known: set[str] | None) -> None:
    for name in given:
        if name in ours:
            raise UserError(f"{key} must not hold {name}, which follows from {ours[name]}")
        if known and name not in known:
            near = difflib.get_close_matches(name, sorted(known - set(ours)), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
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
