"""vLLM's asynchronous engine behind the few calls that the generate stage needs; the only file that imports vLLM."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import psutil

from pipelines.engines.kill_with_parent import guard


class EngineDiedError(RuntimeError):
    """The engine's processes are gone or unusable; no request of this process can succeed any more."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Generated ids with the end token, why they ended (stop | length), and the text where stop strings cut it."""

    ids: list[int]
    finish_reason: str
    text: str | None = None


class VllmEngine:
    """AsyncLLM of one checkpoint. Starting takes from half a minute to some minutes."""

    def __init__(self, model_path: str, arguments: dict[str, Any]):
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model_path, **arguments))
        config = self.llm.vllm_config
        self.max_length: int = config.model_config.max_model_len
        self.num_slots: int = config.scheduler_config.max_num_seqs
        self.processes = psutil.Process().children(recursive=True)
        self.guard = guard(self.processes)

    async def complete(self, prompt: dict[str, Any], sampling: dict[str, Any], name: str) -> Generated:
        """Answer to a prompt of token ids and images, or visual tokens [P, K, D].

        Raises:
            EngineDiedError: the engine is gone.
            Exception: vLLM refused this request or failed on it.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # pyright: ignore[reportMissingImports]

        given: Any = prompt
        try:
            outputs = [output async for output in self.llm.generate(given, sampling_params(sampling), name)]
        except EngineDeadError as error:
            raise EngineDiedError(str(error)) from error
        except EngineGenerateError as error:
            raise error.__cause__ or error from None
        (answer,) = outputs[-1].outputs
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave the request up: {answer.finish_reason}")
        text = answer.text if sampling.get("stop") else None
        return Generated(list(answer.token_ids), answer.finish_reason, text)

    def kill(self) -> None:
        """SIGKILL to the engine's processes: one that hangs hears nothing else."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                process.kill()


def sampling_params(sampling: dict[str, Any]) -> Any:
    """vLLM's SamplingParams; the answer comes once, as ids alone unless stop strings make vLLM look at the text."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]

    given = dict(sampling)
    if structured := given.pop("structured_outputs", None):
        given["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(**given, detokenize=bool(given.get("stop")), output_kind=RequestOutputKind.FINAL_ONLY)
