"""vLLM's engine on a tiny checkpoint, and its answers beside those of transformers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otprune.vllm.request import engine_arguments
from tests.vllm.references import NEW, Case

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": True,
}


def start(folder: Path, own_process: bool = False, **more: Any) -> Any:
    """An engine. With `own_process` its core is a process of its own, as in a job; without, it starts sooner."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return LLM(model=str(folder), **{**SMALL, **engine_arguments(architecture), **more})


def stop(llm: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def ask(llm: Any, cases: Sequence[Case]) -> list[Any]:
    """vLLM's output for each case, all in the engine at once."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=5)
    return [request.outputs[0] for request in llm.generate([each.prompt for each in cases], params, use_tqdm=False)]


def equal(outputs: Sequence[Any], cases: Sequence[Case]) -> int:
    """The number of answers whose tokens are transformers' own."""
    return sum(list(output.token_ids) == each.tokens for output, each in zip(outputs, cases, strict=True))


def worst(outputs: Sequence[Any], cases: Sequence[Case]) -> float:
    """The largest difference of a log-probability, over the five likeliest tokens of each step."""
    return max(
        abs(token.logprob - float(each.logprobs[step, i]))
        for output, each in zip(outputs, cases, strict=True)
        for step, likely in enumerate(output.logprobs)
        for i, token in likely.items()
    )
