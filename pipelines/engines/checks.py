"""What a job has to know of its engine before anything starts: what it takes, what decides its answers, its GPUs.

Nothing here imports vLLM: the driver may run where it is not installed.
"""

import ast
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from otprune.methods import METHODS
from otprune.models import resolve_checkpoint
from otprune.models.checkpoint import ANYRES, read_config
from pipelines.config.keys import Config
from pipelines.errors import UserError

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


def check_engine(config: Config) -> None:
    """Refuses what the engine cannot do.

    Raises:
        UserError: an unknown or a misplaced argument, a method inside the language model, or no vLLM on this machine,
            which is to run the job itself.
    """
    engine = config.engine
    if engine.name == "transformers":
        for name, given in (("kwargs", engine.kwargs), ("sampling", engine.sampling)):
            if given:
                raise UserError(
                    f"engine.{name} must be empty unless engine.name=vllm, which takes them; got {', '.join(given)}"
                )
        return
    if config.prune.method in METHODS and METHODS[config.prune.method].kind == "in_llm":
        raise UserError(
            f"engine.name must be transformers with prune.method={config.prune.method}, got vllm: the method deletes "
            "tokens between the layers of the language model, which vLLM runs as a whole"
        )
    folder = _installed()
    if folder is None and config.ray.address is None:
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
    """What of the engine decides the answers, by dotted key."""
    engine = config.engine
    decisive = {name: value for name, value in engine.kwargs.items() if name not in NEUTRAL}
    return {
        "engine.name": engine.name,
        **{f"engine.kwargs.{name}": value for name, value in sorted(decisive.items())},
        **{f"engine.sampling.{name}": value for name, value in sorted(engine.sampling.items())},
    }


def takes_images(config: Config) -> bool:
    """Whether the engine encodes the images itself: unpruned, nothing is gained by doing it elsewhere."""
    if config.engine.name != "vllm" or config.prune.method != "none":
        return False
    return read_config(resolve_checkpoint(config.model.path))["model_type"] != ANYRES  # whose tiles are cut already


def num_workers(config: Config) -> int:
    """GPUs of one engine where there are any: tensor parallel times pipeline parallel."""
    kwargs = config.engine.kwargs
    return kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1)


def engine_bundles(config: Config) -> list[dict[str, float]]:
    """Bundles of an engine that Ray spreads over nodes (`distributed_executor_backend: ray`); empty for all others.

    Any other engine lives in its actor, which holds all its GPUs on one node.
    """
    if config.engine.kwargs.get("distributed_executor_backend") != "ray":
        return []
    return [{"GPU": 1.0, "CPU": config.generate.num_cpus} for _ in range(num_workers(config))]


def units_in_flight(config: Config) -> int:
    """Units an actor works on at once: enough requests for the engine's slots while others come to their end."""
    if config.engine.name != "vllm":
        return 1
    if config.engine.units_in_flight is not None:
        return config.engine.units_in_flight
    slots = config.engine.kwargs.get("max_num_seqs", DEFAULT_MAX_NUM_SEQS)
    requests = config.unit.images * (1 + len(config.prompt.more))
    return min(MAX_UNITS_IN_FLIGHT, math.ceil(slots / requests) + 2)


def engine_arguments(config: Config, num_gpus: float) -> dict[str, Any]:
    """Arguments of vLLM's engine: what follows from the job, under what `engine.kwargs` says."""
    images = takes_images(config)
    arguments: dict[str, Any] = {
        "max_num_seqs": DEFAULT_MAX_NUM_SEQS,
        "mm_processor_cache_gb": 0,  # no image comes twice
        "disable_log_stats": True,
        # Without a place for images the vision tower is not loaded; the encode stage holds it.
        "limit_mm_per_prompt": {"image": MAX_PICTURES if images else 0},
        "enable_mm_embeds": not images,
    }
    # As our own actors have it; left to itself, vLLM takes what the checkpoint was saved in.
    auto = "bfloat16" if num_gpus else "float32"
    arguments["dtype"] = auto if config.model.dtype == "auto" else config.model.dtype
    if num_gpus == 0:
        arguments["enforce_eager"] = True  # on a CPU, compiling takes longer than it saves
    if 0 < num_gpus < 1:
        arguments["gpu_memory_utilization"] = round(min(0.9, num_gpus), 2)  # the rest is the encoder's
    return arguments | config.engine.kwargs


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
