"""vLLM's classes for models whose pictures are spans of the prompt. See `fields` for what a request holds.

The processor checks a request's fields and writes the spans into the prompt. The model takes the rows as they come,
and the positions of M-RoPE from the request. vLLM hashes all fields of a picture together, positions included, so its
caches keep equal rows at other positions apart. No image processor is called, and no vision tower is loaded.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataParser  # pyright: ignore[reportMissingImports]
from vllm.multimodal.processing import (  # pyright: ignore[reportMissingImports]
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from otprune.vllm.architectures import ARCHITECTURES
from otprune.vllm.fields import FIELDS, MROPE_FIELDS, Rules

IMAGE = "image"  # vLLM's name of the modality


def field_configs(data: Mapping[str, Tensor]) -> dict[str, Any]:
    """How vLLM cuts the fields of a prompt into those of each picture, and puts pictures of a step together again.

    Fields that say where rows go stay on the CPU, where positions are computed.
    """
    if "image_rows" not in data:
        return {}
    flat, batched = MultiModalFieldConfig.flat_from_sizes, MultiModalFieldConfig.batched
    rows, lengths = data["image_rows"], data["image_lengths"]
    configs = {
        "image_embeds": flat(IMAGE, rows),
        "image_rows": batched(IMAGE, keep_on_cpu=True),
        "image_tokens": flat(IMAGE, lengths, keep_on_cpu=True),
        "image_lengths": batched(IMAGE, keep_on_cpu=True),
        "image_positions": flat(IMAGE, lengths, keep_on_cpu=True),
        "image_extents": batched(IMAGE, keep_on_cpu=True),
    }
    return {name: config for name, config in configs.items() if name in data}


class SpanParser(MultiModalDataParser):
    """Takes the fields of a prompt, if they fit the model, and nothing else."""

    def __init__(self, rules: Rules):
        super().__init__()
        self.rules = rules

    def _parse_image_data(self, data: Any) -> DictEmbeddingItems:
        names = FIELDS + MROPE_FIELDS if self.rules.mrope else FIELDS
        return DictEmbeddingItems(
            self.rules.check(data), modality=IMAGE, required_fields=set(names), fields_factory=field_configs
        )


class SpanInfo(BaseProcessingInfo):
    """What vLLM asks before it has seen a request."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {IMAGE: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {IMAGE: seq_len}  # a span may fill the prompt

    def get_data_parser(self) -> SpanParser:
        return SpanParser(self.rules())

    def rules(self) -> Rules:
        model, config = self.ctx.model_config, self.get_hf_config()
        text = config.get_text_config()
        return Rules(
            image_token=image_token(config),
            width=model.get_inputs_embeds_size() * (1 + num_levels(config)),
            vocabulary=model.get_vocab_size(),
            mrope=model.uses_mrope,
            # vLLM's table of rotations is four times as long, so text and answer fit behind the pictures.
            max_positions=text.max_position_embeddings,
        )


class SpanDummy(BaseDummyInputsBuilder):
    """vLLM profiles a vision tower with dummy pictures. No tower is loaded, so there are none."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        return {}


class SpanProcessor(BaseMultiModalProcessor):
    """Writes the spans into the prompt, in place of its image tokens."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's own, for a prompt with one image token for each picture.

        Raises:
            ValueError: if the prompt has more image tokens or fewer. vLLM would read one too many as text.
        """
        found = inputs.prompt.count(image_token(self.info.get_hf_config()))
        expected = inputs.mm_data_items.get_count(IMAGE, strict=False)
        if found != expected:
            raise ValueError(f"a prompt must hold one image token for each picture: {expected}, got {found}")
        return super().apply(inputs, timing_ctx)

    def _get_mm_fields_config(self, hf_inputs: Mapping[str, Tensor], hf_processor_mm_kwargs: Any) -> dict[str, Any]:
        return field_configs(hf_inputs)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        token = image_token(self.info.get_hf_config())

        def replacement(picture: int) -> PromptUpdateDetails:
            span = out_mm_kwargs[IMAGE][picture]["image_tokens"].data
            return PromptUpdateDetails.select_token_id(span.tolist(), token)

        return [PromptReplacement(modality=IMAGE, target=[token], replacement=replacement)]


class SpanMixin:
    """A model whose visual tokens come with the request."""

    def embed_multimodal(
        self, image_embeds: Tensor | None = None, image_rows: Tensor | None = None, **_: Any
    ) -> Sequence[Tensor]:
        """The rows of each picture of a step, [K, W] in the language model's dtype."""
        if image_embeds is None or image_rows is None:
            return ()
        dtype = next(self.get_language_model().parameters()).dtype  # pyright: ignore[reportAttributeAccessIssue]
        return image_embeds.to(dtype).split(image_rows.flatten().tolist())


class MropeMixin:
    """A model whose kept tokens stand where the whole picture has them."""

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions [3, L] of a prompt, and what to add to a later token's index to get its position.

        Text counts by one on each axis. A span has the positions of the request, from where it begins, and what
        follows it begins `extent` later.
        """
        pieces: list[np.ndarray] = []
        index = position = 0  # of the next token

        def text(end: int) -> None:
            nonlocal index, position
            pieces.append(np.tile(np.arange(position, position + end - index), (3, 1)))
            index, position = end, position + end - index

        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            text(feature.mm_position.offset)
            span = feature.data["image_positions"].data.numpy().T
            pieces.append(span + position)
            index, position = index + span.shape[1], position + int(feature.data["image_extents"].data)
        text(len(input_tokens))
        return torch.from_numpy(np.concatenate(pieces, axis=1)), position - index


class DeepStackMixin:
    """A model whose rows hold a part for each DeepStack level. vLLM turns DeepStack off where no tower is loaded."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        config: Any = vllm_config.model_config.hf_config
        levels = num_levels(config)
        self.use_deepstack = levels > 0
        self.deepstack_num_level = levels
        self.visual_dim = config.vision_config.out_hidden_size
        self.multiscale_dim = self.visual_dim * levels
        if levels:
            shape = (vllm_config.scheduler_config.max_num_batched_tokens, config.text_config.hidden_size)
            self.deepstack_input_embeds = [torch.zeros(shape) for _ in range(levels)]
            self.deepstack_input_embeds_num_tokens = 0


def image_token(config: Any) -> int:
    """The token id of a picture's placeholder, from a checkpoint's configuration."""
    token = getattr(config, "image_token_id", None)
    return config.image_token_index if token is None else token


def num_levels(config: Any) -> int:
    """DeepStack levels."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())


def __getattr__(name: str) -> type:
    """`Span<Architecture>`, made when vLLM asks for it, so that one family's imports are not another's."""
    architecture = name.removeprefix("Span")
    if architecture == name or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, other_name = ARCHITECTURES[architecture].partition(":")
    stock = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), other_name or architecture)
    bases: list[type] = [SpanMixin]
    if hasattr(stock, "get_mrope_input_positions"):
        bases.append(MropeMixin)
    if hasattr(stock, "_compute_deepstack_embeds"):
        bases.append(DeepStackMixin)
    made = type(name, (*bases, stock), {"__module__": __name__})
    register = MULTIMODAL_REGISTRY.register_processor(SpanProcessor, info=SpanInfo, dummy_inputs=SpanDummy)
    globals()[name] = register(made)
    return globals()[name]
