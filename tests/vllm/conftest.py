"""Both engines on the demo model, each started once, and the visual tokens of demo scenes."""

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from otprune.models import llava_encoder, read_checkpoint
from pipelines.config.keys import PromptConfig, PruneConfig
from pipelines.engines.transformers_actor import Generator
from tests.vllm.engines_on_demo import CPU, GENERATE, Running, pixels_of

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    """Takes visual tokens."""
    running = Running(images=False)
    yield running
    running.close()


@pytest.fixture(scope="session")
def transformers_engine(demo_model) -> Generator:
    return Generator(
        checkpoint=read_checkpoint(str(demo_model)),
        prompt=PromptConfig(),
        generate=GENERATE,
        prune=PruneConfig(method="none"),
        settings={},
        place=CPU,
    )


@pytest.fixture(scope="session")
def encoded(demo_model, scene_png) -> Callable[[Sequence[int]], torch.Tensor]:
    """Visual tokens [n, 256, 192] of the scenes with these numbers."""
    encoder = llava_encoder.load(read_checkpoint(str(demo_model)), dtype=torch.float32, device="cpu")
    return lambda numbers: encoder(pixels_of(scene_png, numbers))
