"""The stage with vLLM on the demo model, in a loop of its own; units of demo scenes; what both engines say of them."""

import asyncio
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from otprune import num_kept, select_tokens
from otprune.models import Kept, read_checkpoint
from pipelines.config.keys import GenerateConfig, PromptConfig
from pipelines.config.load import load_config
from pipelines.engines.vllm_actor import VllmGenerator
from pipelines.output.unit import Unit
from pipelines.stages.gpu import Place
from pipelines.stages.ragged import Ragged
from pipelines.stages.token_arrays import pack
from pipelines.stages.unit_batch import Answer, Image, UnitBatch
from tests.helpers import DEMO

SMALL = (
    "engine.name=vllm",
    "engine.kwargs.max_num_seqs=32",
    "engine.kwargs.max_model_len=512",
    "engine.kwargs.kv_cache_memory_bytes=268435456",
)
GENERATE = GenerateConfig(max_new_tokens=48)
CPU = Place("cpu", "float32")
CAPTION = "describe the image ."
SIZE, NUM_VISUAL = (224, 224), 256  # of every demo scene


class DiedError(Exception):
    """Stands for the end of the process."""


class Mortal(VllmGenerator):
    """The stage, whose death is an exception."""

    def die(self, reason: str):
        self.engine.kill()
        raise DiedError(reason)


class Running:
    """A stage and the event loop that its engine lives in, as in an actor."""

    def __init__(
        self,
        images: bool,
        timeout_seconds: float = 600.0,
        *arguments: str,
        generate: GenerateConfig = GENERATE,
    ):
        config = load_config([*DEMO, *SMALL, *arguments])
        self.loop = asyncio.new_event_loop()
        self.stage = Mortal(
            checkpoint=read_checkpoint(config.model.path),
            prompt=PromptConfig(),
            generate=generate,
            engine=replace(config.engine, timeout_seconds=timeout_seconds),
            images=images,
            place=CPU,
        )

    def run(self, *units: UnitBatch) -> list[UnitBatch]:
        """All units at once, as Ray Data hands them to an actor."""

        async def together() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self.stage(unit_batch.to_row()) for unit_batch in units))

        return [UnitBatch.from_row(row) for row in self.loop.run_until_complete(together())]

    def close(self) -> None:
        self.stage.engine.kill()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()


def pixels_of(scene_png: Callable[[int], bytes], numbers: Sequence[int]) -> torch.Tensor:
    """uint8 [n, 224, 224, 3]."""
    return torch.stack([torch.from_numpy(np.array(PILImage.open(io.BytesIO(scene_png(i))))) for i in numbers])


def kept(features: torch.Tensor, retention: float) -> torch.Tensor:
    """The tokens that OTPrune keeps, with the demo's settings."""
    keep = select_tokens(features, num_kept(retention, features.shape[1]), gamma=0.5, gamma_scale="trace")
    return features.gather(1, keep[..., None].expand(-1, -1, features.shape[2]))


def unit(
    array: Sequence[torch.Tensor] | torch.Tensor,
    prompts: list[list[str]] | None = None,
    first: int = 0,
    name: str = "tokens",
) -> UnitBatch:
    prompts = prompts or [[CAPTION]] * len(array)
    images = [
        Image(f"id{i}", "a.parquet", first + i, f"{first + i:064x}", texts, sizes=[SIZE])
        for i, texts in enumerate(prompts)
    ]
    unit_batch = UnitBatch(Unit("0123456789ab", first, first + len(images), ("a.parquet",)), images=images)
    if name == "tokens":
        rows = [Kept(row, torch.arange(len(row)), NUM_VISUAL) for row in array]
        unit_batch.arrays = pack(rows, array[0].shape[-1], array[0].dtype)
    else:
        frames = [picture.flatten().numpy() for picture in array]
        unit_batch.arrays = {name: Ragged.of(frames, np.empty(0, np.uint8))}
    return unit_batch


def answers(unit_batch: UnitBatch) -> list[list[Answer]]:
    assert unit_batch.error is None, unit_batch.error
    return [image.answers for image in unit_batch.images]
