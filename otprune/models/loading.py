"""Builds one part of a checkpoint's model and reads only the weights of that part."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from otprune.models.checkpoint import Checkpoint, CheckpointError, read_header, weight_files

HEAD_PREFIX = r"^(model\.)?language_model\.(?=lm_head\.)"
LANGUAGE_PREFIX = r"^(model\.)?(language_model|text_model)\.(model\.)?"

_FROM_HEADERS: ContextVar[bool] = ContextVar("from_headers", default=False)


_fitting: set[tuple[Path, str]] = set()  # folder and digest of what `check_weights` has found to fit


def check_weights(checkpoint: Checkpoint) -> None:
    """Loads both halves of a checkpoint with the shapes in the headers of its files, but without any values.

    Takes a second or two, and hardly any memory, before any GPU is held. The language model is not looked at where its
    weights are quantised, or have experts.

    Raises:
        CheckpointError: if weights are missing, or have other shapes than config.json says.
    """
    folder, record = checkpoint.path, checkpoint.record
    if (folder, checkpoint.digest) in _fitting:
        return
    place = {"dtype": torch.bfloat16, "device": "cpu"}
    try:
        with _from_headers():
            record.load_encoder(checkpoint, **place)
            # Quantised weights have names of their engine's own; joining experts would take memory for all of them.
            quantized = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
            if not quantized and not any(".experts." in name for name in weight_names(folder)):
                record.load_language_model(checkpoint, **place)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    _fitting.add((folder, checkpoint.digest))


@contextmanager
def _from_headers() -> Iterator[None]:
    """Makes `load_part` and `read_tensors` take the shapes of weights alone."""
    token = _FROM_HEADERS.set(True)
    try:
        yield
    finally:
        _FROM_HEADERS.reset(token)


def load_causal_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> Any:
    """The language model of a checkpoint, by the type of its `text_config`, in eval mode.

    The names of the weights are those of the released llava-hf checkpoints and those under which transformers 5 saves.
    A checkpoint without a head whose configuration ties the head of the whole model has its embedding for a head.

    Raises:
        CheckpointError: if weights are missing.
    """
    config: Any = AutoConfig.from_pretrained(checkpoint.path)
    has_head = any(name.endswith("lm_head.weight") for name in weight_names(checkpoint.path))
    if config.tie_word_embeddings and not has_head:
        config.text_config.tie_word_embeddings = True
    names = {HEAD_PREFIX: "", LANGUAGE_PREFIX: "model."}
    return load_part(AutoModelForCausalLM, checkpoint.path, config.text_config, names, dtype).to(device)


def load_part(cls: Any, folder: Path, config: Any, names: dict[str, str], dtype: torch.dtype) -> Any:
    """An instance of `cls` in eval mode, with the part of the checkpoint that `names` maps onto it.

    Args:
        names: {regular expression of a prefix of weight names: prefix in `cls`}.

    Raises:
        CheckpointError: if weights are missing, or a file of them is not whole.
    """
    weight_names(folder)  # safetensors and transformers would not name the file
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report the other half of the checkpoint as unexpected weights
    transformers_logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": True}
    if _FROM_HEADERS.get():
        with torch.device("meta"):
            cls = type(cls.from_config(config))  # an `Auto` class takes no tensors
        source = {"pretrained_model_name_or_path": None, "state_dict": _shapes(folder, dtype)}
    try:
        model, info = cls.from_pretrained(
            **source,
            config=config,
            dtype=dtype,
            key_mapping=names,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_missing(info["missing_keys"], model, folder)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{folder} must hold {name} of {type(model).__name__} in shape {list(wanted)}, as config.json says, got "
            f"{list(stored)}"
        )
    return model.eval()


def fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Loads `tensors` into `module`; raises CheckpointError if one is missing, or has another shape."""
    check_missing(set(module.state_dict()) - set(tensors), module, folder)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} must hold what config.json says: {reason}") from error


def _shapes(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, as zeros of their shape that take no memory."""
    zero = torch.zeros((), dtype=dtype)
    return {
        name: zero.expand(entry["shape"])
        for file in weight_files(folder)
        for name, entry in read_header(file)[0].items()
    }


def check_missing(names: Iterable[str], module: nn.Module, folder: Path) -> None:
    """Raises CheckpointError if there are any `names`, the missing weights of `module`."""
    if missing := sorted(names):
        raise CheckpointError(f"{folder} lacks {len(missing)} weights of {type(module).__name__}, e.g. {missing[0]}")


def weight_names(folder: Path) -> set[str]:
    """The names of a checkpoint's tensors; raises CheckpointError if a file of them is not whole."""
    return {name for file in weight_files(folder) for name in read_header(file)[0]}


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names match the regular expression `prefix` at the start: {rest of the name: tensor}.

    Raises:
        CheckpointError: if a file of weights is not whole.
    """
    from safetensors import safe_open

    weight_names(folder)  # safetensors would not name the file
    if _FROM_HEADERS.get():
        shapes = _shapes(folder, torch.bfloat16)
        return {name[match.end() :]: zeros for name, zeros in shapes.items() if (match := re.match(prefix, name))}
    tensors = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                if match := re.match(prefix, name):
                    tensors[name[match.end() :]] = stored.get_tensor(name)
    return tensors
