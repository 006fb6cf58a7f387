"""Third stage with engine.name=vllm, a GPU actor: kept visual tokens, or whole images, and prompts -> captions.

Sets `answers` of every image, and of whole images `num_visual_tokens` and `sample`; drops `tokens` and `kept`, or
`pixels`. Ray Data hands the actor several units at once: their requests share the engine's slots, so that it does not
run empty at the end of each. A request that fails rejects its image. An engine that is dead, or hangs, ends the
process; Ray starts it again and retries the units, and what kills every engine is isolated like anything else that
kills its process (run/isolate.py).
"""

import asyncio
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from PIL import Image as PILImage

from otprune.models import Checkpoint, Completion, load_prompter
from pipelines.config.keys import EngineConfig, GenerateConfig
from pipelines.engines.one_size_at_a_time import EqualGate
from pipelines.engines.requests import Request, RequestMaker, as_answer, give_answers
from pipelines.engines.vllm_client import EngineDiedError, Generated, VllmEngine
from pipelines.engines.vllm_engine import engine_arguments
from pipelines.stages.batches import SYSTEMATIC, Suspicion
from pipelines.stages.gpu import Place
from pipelines.stages.seeds import sampling_seed
from pipelines.stages.thumbnail import thumbnail
from pipelines.stages.token_arrays import as_tensor, unpack
from pipelines.stages.unit_batch import Answer, Sample, UnitBatch
from pipelines.text import clean

QUEUED = 1.25  # requests in the engine for each of its slots: the next are at hand when one is free


class Engine(Protocol):
    """What the stage needs of an engine; vLLM's is `VllmEngine`."""

    max_length: int  # tokens of prompt and answer
    num_slots: int  # requests that it runs at once

    async def complete(self, prompt: dict[str, Any], sampling: dict[str, Any], name: str) -> Generated:
        """Raises EngineDiedError; or anything else, and this request alone has failed."""
        ...

    def kill(self) -> None:
        """Ends the engine's processes at once."""
        ...


class VllmGenerator:
    """The actor. With `images` the engine gets the images themselves and encodes them."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        conversation: str,
        generate: GenerateConfig,
        engine: EngineConfig,
        images: bool,
        place: Place,
    ):
        self.images, self.seed, self.timeout_seconds = images, generate.seed, engine.timeout_seconds
        self.prompter = load_prompter(checkpoint.path)
        self.num_visual_tokens = checkpoint.num_visual_tokens
        self.sampling = {
            "temperature": generate.temperature,
            "top_p": generate.top_p,
            "stop_token_ids": self.prompter.end_tokens,
            "ignore_eos": True,  # the tokenizer's; what ends an answer is the checkpoint's
            **engine.sampling,
        }
        self.engine = self.start_engine(str(checkpoint.path), engine_arguments(engine, images, place))
        length = min(self.prompter.max_length, self.engine.max_length)
        self.requests = RequestMaker(self.prompter, conversation, generate.max_new_tokens, length)
        self.gate = EqualGate(math.ceil(QUEUED * self.engine.num_slots))
        self.clock = SharedClock()
        self.suspicion = Suspicion()
        self.last_progress = time.monotonic()
        self.watchdog: asyncio.Task | None = None

    def start_engine(self, model_path: str, arguments: dict[str, Any]) -> Engine:
        return VllmEngine(model_path, arguments)

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.watchdog is None or self.watchdog.done():
            self.watchdog = asyncio.create_task(self._watch())
        unit_batch = UnitBatch.from_row(row)
        if unit_batch.error is None:
            try:
                with self.clock.share(unit_batch):
                    await self._generate(unit_batch)
            except EngineDiedError as error:
                self.die(f"the engine died: {clean(str(error))}")
            except Exception as error:
                unit_batch.error = f"generate: {type(error).__name__}: {clean(str(error))}"
        unit_batch.arrays = {}
        return unit_batch.to_row()

    async def _generate(self, unit_batch: UnitBatch) -> None:
        requests, bad = self._make_requests(unit_batch)
        results = await asyncio.gather(*(self._answer(unit_batch, r) for r in requests), return_exceptions=True)
        done: dict[tuple[int, int], Answer] = {}
        failed: dict[int, BaseException] = {}
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, EngineDiedError | asyncio.CancelledError):
                raise result
            if isinstance(result, BaseException):
                failed[request.image] = result
            else:
                done[request.image, request.prompt] = result
        if not done and len(failed) >= SYSTEMATIC:
            raise next(iter(failed.values()))
        self.suspicion.note(len(done), failed.values())
        for i, error in failed.items():
            unit_batch.reject(i, "generate", f"{type(error).__name__}: {error}")
        give_answers(unit_batch, done, bad | set(failed))

    def _make_requests(self, unit_batch: UnitBatch) -> tuple[list[Request], set[int]]:
        """The unit's requests, and the images whose prompts do not fit."""
        if not self.images:
            return self.requests.of_unit(unit_batch, unpack(unit_batch))
        pixels, pictures = as_tensor(unit_batch.arrays["pixels"]), []
        for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
            pictures.append([list(pixels[rows.start : rows.stop])] * len(image.prompts))
            image.num_visual_tokens = self.num_visual_tokens * image.num_pictures
            if image.sampled:
                kept = list(range(self.num_visual_tokens))  # every token is kept
                image.sample = Sample(thumbnail(pixels[rows.start]), kept, self.num_visual_tokens)
        return self.requests.of_unit(unit_batch, pictures, num_tokens=self.num_visual_tokens)

    async def _answer(self, unit_batch: UnitBatch, request: Request) -> Answer:
        sizes = {len(picture) for picture in request.visual}
        if len(sizes) > 1:
            raise ValueError(f"vLLM must get equal numbers of tokens of all pictures of a prompt, got {sorted(sizes)}")
        async with self.gate.admit(sizes.pop()):
            if self.gate.inside == 1:
                self.last_progress = time.monotonic()
            sampling = self.sampling | {"max_tokens": request.max_new_tokens}
            if sampling["temperature"] > 0:
                sampling["seed"] = sampling_seed(unit_batch.images[request.image].sha256, request.prompt, self.seed)
            name = f"{unit_batch.unit.name}:{request.image}:{request.prompt}"
            try:
                generated = await self.engine.complete(self._prompt(request), sampling, name)
            finally:
                self.last_progress = time.monotonic()
        return as_answer(self._completion(request, generated), request.num_visual)

    def _prompt(self, request: Request) -> dict[str, Any]:
        """One placeholder for each picture, which vLLM widens to the number of the picture's tokens."""
        first, *rest = request.ids
        ids = [*first, *(token for after in rest for token in (self.prompter.image_token, *after))]
        if self.images:
            pictures = [PILImage.fromarray(pixels.numpy()) for pixels in request.visual]
        else:
            pictures = torch.stack(request.visual)  # [P, K, D]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": pictures}}

    def _completion(self, request: Request, generated: Generated) -> Completion:
        """By the tokens, as the transformers engine does; by vLLM's own text where stop strings cut it."""
        if generated.text is None:
            return self.prompter.completion(request.length, generated.ids)
        return Completion(
            text=generated.text.strip(),
            num_prompt_tokens=request.length,
            num_generated_tokens=len(generated.ids),
            finish_reason=generated.finish_reason,
        )

    async def _watch(self) -> None:
        """Ends an engine in which requests are, and none has come back for `timeout_seconds`."""
        while True:
            await asyncio.sleep(self.timeout_seconds / 20)
            if self.gate.inside and time.monotonic() - self.last_progress > self.timeout_seconds:
                self.die(f"the engine finished no request for engine.timeout_seconds={self.timeout_seconds:g}")

    def die(self, reason: str) -> NoReturn:
        """Ends the process and its engine, so that Ray starts both afresh.

        `os._exit`, since an orderly exit would tell Ray that the actor is meant to stay dead.
        """
        print(f"{reason}; the actor restarts", flush=True)
        self.engine.kill()
        os._exit(1)


class SharedClock:
    """Divides wall time among the units at work, so that the seconds of all add up to the actor's."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}
        self._last = 0.0

    @contextmanager
    def share(self, unit_batch: UnitBatch) -> Iterator[None]:
        self._tick()
        self._shares[id(unit_batch)] = 0.0
        try:
            yield
        finally:
            self._tick()
            unit_batch.seconds["generate"] = unit_batch.seconds.get("generate", 0.0) + self._shares.pop(id(unit_batch))

    def _tick(self) -> None:
        now = time.perf_counter()
        for key in self._shares:
            self._shares[key] += (now - self._last) / len(self._shares)
        self._last = now
