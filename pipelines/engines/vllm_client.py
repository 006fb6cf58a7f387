"""vLLM's asynchronous engine behind the few calls that the generate stage needs. Only this module imports vLLM."""

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from otprune.vllm.found import make_findable
from pipelines.config.keys import EngineConfig
from pipelines.engines.kill_with_parent import guard

if TYPE_CHECKING:  # these import torch
    from otprune.models import Checkpoint
    from pipelines.stages.gpu import Place

MAX_PICTURES = 8  # pictures of one prompt; benchmarks ask about up to seven
DEFAULT_MAX_NUM_SEQS = 256


class EngineDiedError(RuntimeError):
    """The engine's processes are gone or unusable. No further request of this process can succeed."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The output of one request."""

    ids: list[int]  # generated tokens, including the end token
    finish_reason: str  # stop | length | repetition, where vLLM's own detector (`repetition_detection`) ended it
    text: str | None = None  # only for a request with stop strings, which cut the text


class VllmEngine:
    """vLLM's `AsyncLLM` of one checkpoint. Its start takes from half a minute to some minutes."""

    def __init__(self, model_path: str, arguments: dict[str, Any]):
        # Set before the import, at which vLLM configures its logging.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        make_findable(arguments.get("distributed_executor_backend"))
        from vllm import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model_path, **arguments))
        config = self.llm.vllm_config
        self.max_length: int = config.model_config.max_model_len
        self.num_slots: int = config.scheduler_config.max_num_seqs
        # Listed before the guard starts, so that the guard is not one of them.
        self.processes = psutil.Process().children(recursive=True)
        self.guard = guard(self.processes)

    async def complete(self, prompt: dict[str, Any], sampling: dict[str, Any], name: str) -> Generated:
        """The output for a prompt of token ids and either images or visual tokens (`otprune.vllm.fields`).

        `name` must be unique among the requests in the engine.

        Raises:
            EngineDiedError: if the engine is dead.
            Exception: if vLLM refuses this request or fails on it.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # pyright: ignore[reportMissingImports]

        vllm_prompt: Any = prompt
        try:
            outputs = [output async for output in self.llm.generate(vllm_prompt, sampling_params(sampling), name)]
        except EngineDeadError as error:
            raise EngineDiedError(str(error)) from error
        except EngineGenerateError as error:
            raise error.__cause__ or error from None
        (answer,) = outputs[-1].outputs
        if answer.finish_reason not in ("stop", "length", "repetition"):
            raise RuntimeError(f"vLLM gave the request up: {answer.finish_reason}")
        text = answer.text if sampling.get("stop") else None
        return Generated(list(answer.token_ids), answer.finish_reason, text)

    def kill(self) -> None:
        """Sends SIGKILL to the engine's processes: a process that hangs ignores any other signal."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                process.kill()


def sampling_params(sampling: dict[str, Any]) -> Any:
    """vLLM's `SamplingParams`, which ask for one output at the end of the answer.

    The output is ids alone, without text, unless there are stop strings: vLLM has to detokenize an answer to find them.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]

    params = dict(sampling)
    if structured := params.pop("structured_outputs", None):
        params["structured_outputs"] = StructuredOutputsParams(**structured)
    if repetition := params.pop("repetition_detection", None):
        from vllm.sampling_params import RepetitionDetectionParams  # pyright: ignore[reportMissingImports]

        params["repetition_detection"] = RepetitionDetectionParams(**repetition)
    return SamplingParams(**params, detokenize=bool(params.get("stop")), output_kind=RequestOutputKind.FINAL_ONLY)


def engine_arguments(engine: EngineConfig, checkpoint: "Checkpoint", images: bool, place: "Place") -> dict[str, Any]:
    """Arguments of vLLM's engine: those that follow from the job, overridden by `engine.kwargs`.

    With `images` the engine encodes images itself; otherwise it gets visual tokens, and does not load the vision tower,
    which the encode stage holds.
    """
    arguments: dict[str, Any] = {
        "max_num_seqs": DEFAULT_MAX_NUM_SEQS,
        "mm_processor_cache_gb": 0,  # a cache would not help: no image comes twice
        "disable_log_stats": True,
        # The same dtype as in the encode stage. By default vLLM would take the dtype in which the checkpoint was saved.
        "dtype": str(place.torch_dtype).removeprefix("torch."),
    }
    if images:
        arguments["limit_mm_per_prompt"] = {"image": MAX_PICTURES, "video": 0}
        if checkpoint.options.max_pixels is not None:  # pictures come in frames, which vLLM must not resize again
            most = checkpoint.whole_geometry.most_bytes // 3
            arguments["mm_processor_kwargs"] = {"min_pixels": 1, "max_pixels": most}
    else:
        from otprune.vllm.request import engine_arguments as span_arguments  # imports torch

        arguments |= span_arguments(checkpoint.record.architecture)
    if place.device == "cpu":
        arguments["enforce_eager"] = True  # on a CPU, compiling takes longer than it saves
    elif place.gpu_share < 1:
        arguments["gpu_memory_utilization"] = round(min(0.9, place.gpu_share), 2)  # the rest belongs to the encoder
    overrides = engine.kwargs.get("hf_overrides", {}) | arguments.get("hf_overrides", {})
    return arguments | engine.kwargs | ({"hf_overrides": overrides} if overrides else {})
