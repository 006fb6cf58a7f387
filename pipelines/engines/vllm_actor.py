"""The third stage with engine.name=vllm, a GPU actor: decodes captions from visual tokens or images, and prompts.

Visual tokens go to vLLM as spans, which its plugin `otprune.vllm` takes: any number of them, with their positions.

The stage sets `answers` of every image. If vLLM encodes the images, the stage also sets `num_visual_tokens` and
`sample`. It drops the arrays `tokens` and `kept`, or `pixels`. Ray Data hands the actor several units at once. Their
requests share the engine's slots, so that the slots do not run empty at the end of each unit. A request that fails
rejects its image. If the engine dies or hangs, the actor ends its process; Ray starts the actor again and retries the
units. run/isolate.py finds an image that kills every engine, like any image that kills its process.
"""

import asyncio
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from PIL import Image as PILImage

from otprune.models import Checkpoint, Completion, load_prompter
from otprune.vllm.request import image_fields
from pipelines.config.keys import EngineConfig, GenerateConfig, PromptConfig
from pipelines.engines.repair import Ladder, better_of, failed_again
from pipelines.engines.requests import Request, RequestMaker, Shown, as_answer, give_answers
from pipelines.engines.vllm_client import EngineDiedError, Generated, VllmEngine, engine_arguments
from pipelines.stages.batches import SYSTEMATIC, Suspicion
from pipelines.stages.gpu import Place
from pipelines.stages.thumbnail import make_sample
from pipelines.stages.token_arrays import unpack
from pipelines.stages.unit_batch import Answer, UnitBatch
from pipelines.text import clean

QUEUED = 1.25  # requests in the engine for each of its slots, so that the next request waits there for a free slot


class Engine(Protocol):
    """The interface that the stage needs. `VllmEngine` implements it with vLLM."""

    max_length: int  # most tokens of prompt and answer together
    num_slots: int  # requests that the engine runs at once

    async def complete(self, prompt: dict[str, Any], sampling: dict[str, Any], name: str) -> Generated:
        """Decodes one request.

        Raises:
            EngineDiedError: if the engine is dead.
            Exception: any other one means that only this request failed.
        """
        ...

    def kill(self) -> None:
        """Ends the engine's processes at once."""
        ...


class VllmGenerator:
    """The actor. With `images` the engine gets pixels and encodes them itself."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        prompt: PromptConfig,
        generate: GenerateConfig,
        engine: EngineConfig,
        images: bool,
        place: Place,
    ):
        self.images, self.ladder, self.timeout_seconds = images, Ladder.of(generate), engine.timeout_seconds
        self.prompter, self.checkpoint = load_prompter(checkpoint), checkpoint
        self.sampling = {
            "stop_token_ids": self.prompter.end_tokens,
            "ignore_eos": True,  # ignores the tokenizer's end token: the checkpoint's end tokens end an answer
            **engine.sampling,
        }
        arguments = engine_arguments(engine, checkpoint, images, place)
        self.engine = self.start_engine(str(checkpoint.path), arguments)
        length = min(self.prompter.max_length, self.engine.max_length)
        geometry = checkpoint.geometry
        self.requests = RequestMaker(self.prompter, prompt, geometry, generate.max_new_tokens, length)
        self.places = asyncio.Semaphore(math.ceil(QUEUED * self.engine.num_slots))
        self.num_inside = 0  # requests in the engine
        self.clock = SharedClock()
        self.suspicion = Suspicion()
        self.last_progress = time.monotonic()  # when a request last came back, or entered an empty engine
        self.watchdog: asyncio.Task | None = None

    def start_engine(self, model_path: str, arguments: dict[str, Any]) -> Engine:
        """Starts vLLM. A subclass may start another engine."""
        return VllmEngine(model_path, arguments)

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        # The watchdog needs a running event loop, so the first call starts it and not `__init__`.
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
        requests, rejected = self._make_requests(unit_batch)
        # With `return_exceptions` a failed request does not cancel the unit's other requests.
        results = await asyncio.gather(*(self._answer(unit_batch, r) for r in requests), return_exceptions=True)
        answers: dict[tuple[int, int], Answer] = {}
        failed: dict[int, BaseException] = {}  # by image
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, EngineDiedError | asyncio.CancelledError):
                raise result
            if isinstance(result, BaseException):
                failed[request.image] = result
            else:
                answers[request.image, request.prompt] = result
        if not answers and len(failed) >= SYSTEMATIC:
            raise next(iter(failed.values()))
        self.suspicion.note(len(answers), failed.values())
        for i, error in failed.items():
            unit_batch.reject(i, "generate", f"{type(error).__name__}: {error}")
        give_answers(unit_batch, answers, rejected | set(failed))

    def _make_requests(self, unit_batch: UnitBatch) -> tuple[list[Request], set[int]]:
        """The unit's requests, and the indices of the images that are rejected because a prompt does not fit."""
        if not self.images:
            return self.requests.of_unit(unit_batch, self.requests.shown(unpack(unit_batch)))
        geometry, whole = self.checkpoint.geometry, self.checkpoint.whole_geometry
        all_frames, shown = unit_batch.frames(geometry), []
        for image, rows in zip(unit_batch.images, unit_batch.rows(), strict=True):
            frames = all_frames[rows.start : rows.stop]
            # vLLM encodes images only for jobs that keep every token of what the tower sees.
            counts = [geometry.num_visual(size) for size in image.sizes]
            image.num_visual_tokens = sum(whole.num_visual(size) for size in image.sizes)
            if image.sampled:
                image.sample = make_sample(frames[0], image.sizes[0], list(range(counts[0])), geometry)
            pictures = [
                Shown(frame, count, geometry.span(size, np.arange(count), self.prompter.image_token))
                for frame, count, size in zip(frames, counts, image.sizes, strict=True)
            ]
            shown.append([pictures] * len(image.prompts))
        return self.requests.of_unit(unit_batch, shown)

    async def _answer(self, unit_batch: UnitBatch, request: Request) -> Answer:
        """The answer to the request, after as many attempts as the ladder makes."""
        async with self.places:
            answer = await self._attempt(unit_batch, request, 0)
            while self.ladder.goes_on(answer):
                try:
                    answer = better_of(answer, await self._attempt(unit_batch, request, answer.num_attempts))
                except EngineDiedError:
                    raise
                except Exception:  # this attempt alone failed, and the answer so far is a caption still
                    answer = failed_again(answer)
        return answer

    async def _attempt(self, unit_batch: UnitBatch, request: Request, attempt: int) -> Answer:
        if not self.num_inside:
            self.last_progress = time.monotonic()
        self.num_inside += 1
        try:
            sampling = self.sampling | self.ladder.sampling(attempt) | {"max_tokens": request.max_new_tokens}
            if sampling["temperature"] > 0:
                sampling["seed"] = self.ladder.seed_of(unit_batch.images[request.image], request, attempt)
            name = f"{unit_batch.unit.name}:{request.image}:{request.prompt}:{attempt}"
            generated = await self.engine.complete(self._prompt(request), sampling, name)
        finally:
            self.num_inside -= 1
            self.last_progress = time.monotonic()
        answer = as_answer(self._completion(request, generated), request.num_visual)
        return replace(answer, finish_reason="loop") if generated.finish_reason == "repetition" else answer

    def _prompt(self, request: Request) -> dict[str, Any]:
        """vLLM's prompt: the ids with one placeholder for each picture, and the pictures.

        vLLM itself puts the span of a picture in the place of its placeholder.
        """
        before, *after_pictures = request.ids  # the text ids before the first picture, and after each picture
        ids = [*before, *(token for text in after_pictures for token in (self.prompter.image_token, *text))]
        if self.images:
            pictures: Any = [PILImage.fromarray(np.asarray(picture.content)) for picture in request.pictures]
        else:
            rows = [torch.as_tensor(picture.content) for picture in request.pictures]
            spans = [picture.span for picture in request.pictures]
            pictures = image_fields(rows, spans, self.checkpoint.geometry.axes)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": pictures}}

    def _completion(self, request: Request, generated: Generated) -> Completion:
        """The completion. Its text comes from the ids, as with the transformers engine.

        Where stop strings cut the answer, its text is vLLM's own: the ids still hold what was cut off.
        """
        if generated.text is None:
            return self.prompter.completion(request.length, generated.ids)
        return Completion(
            text=generated.text.strip(),
            num_prompt_tokens=request.length,
            num_generated_tokens=len(generated.ids),
            finish_reason=generated.finish_reason,
        )

    async def _watch(self) -> None:
        """Ends the process if the engine holds requests and has finished none for `timeout_seconds`."""
        while True:
            await asyncio.sleep(self.timeout_seconds / 20)
            if self.num_inside and time.monotonic() - self.last_progress > self.timeout_seconds:
                self.die(f"the engine finished no request for engine.timeout_seconds={self.timeout_seconds:g}")

    def die(self, reason: str) -> NoReturn:
        """Ends the process and its engine, so that Ray starts both afresh."""
        # An orderly exit would tell Ray that the actor is meant to stay dead; `os._exit` looks like a crash.
        print(f"{reason}; the actor restarts", flush=True)
        self.engine.kill()
        os._exit(1)


class SharedClock:
    """Divides wall time evenly among the units in work, so that their seconds add up to the seconds of the actor."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}  # seconds of each unit in work, by the `id` of its batch
        self._last = 0.0  # time of the last tick

    @contextmanager
    def share(self, unit_batch: UnitBatch) -> Iterator[None]:
        """Adds the unit's share of the block's wall time to its seconds of `generate`."""
        self._tick()
        self._shares[id(unit_batch)] = 0.0
        try:
            yield
        finally:
            self._tick()
            unit_batch.seconds["generate"] = unit_batch.seconds.get("generate", 0.0) + self._shares.pop(id(unit_batch))

    def _tick(self) -> None:
        """Divides the time since the last tick. Called before each change of the units in work."""
        now = time.perf_counter()
        for key in self._shares:
            self._shares[key] += (now - self._last) / len(self._shares)
        self._last = now
