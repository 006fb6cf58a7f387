"""Finds a checkpoint, reads the facts that a job needs, and computes a digest of the weights, without loading them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from otprune.shapes import LanguageShape, ModelShape, VisionShape

ANYRES = "llava_next"
FAMILIES = ("llava", ANYRES)
WHOLE_FILE_BYTES = 64 * 2**20  # files up to this size are hashed completely
BLOCK_BYTES = 4096  # of larger files, three blocks of this size are hashed for each tensor
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """The path holds no checkpoint that this package can run."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The facts about a LLaVA checkpoint that a job needs: numbers and names, no weights. It can be pickled."""

    path: Path  # the folder, absolute and with links resolved
    name: str  # as the user gave it
    family: str  # `model_type`, one of FAMILIES
    language: LanguageShape
    language_type: str  # `model_type` of the language model
    vision: VisionShape  # up to the layer that LLaVA reads
    num_visual_tokens: int  # of one square image, before pruning
    mean: tuple[float, ...]  # of each channel, for values in [0, 1]
    std: tuple[float, ...]
    resolutions: tuple[tuple[int, int], ...]  # (height, width) in pixels of LLaVA-1.6's tiled images; () without tiles
    image_token: int  # token id of an image's placeholder
    digest: str  # from `weights_digest`

    @property
    def shape(self) -> ModelShape:
        return ModelShape(vision=self.vision, language=self.language)

    @property
    def has_tiles(self) -> bool:
        """Whether the model is a LLaVA-1.6, which cuts images into tiles: numbers of visual tokens differ."""
        return self.family == ANYRES

    @property
    def most_visual_tokens(self) -> int:
        """Visual tokens of the largest image; in LLaVA-1.6 all patches of the most crops, without newline tokens."""
        area = self.vision.image_size**2
        most_tiles = max((height * width // area for height, width in self.resolutions), default=0)
        return self.vision.num_patches * (1 + most_tiles)


def read_checkpoint(path: str) -> Checkpoint:
    """The facts about the checkpoint at `path`, a local folder or a hub repository. config.json is read once.

    Raises:
        CheckpointError: as `resolve_checkpoint`, or if config.json does not describe a LLaVA.
    """
    folder, stored = _find(path, FAMILIES, "model.path")
    config = json.loads(stored)
    try:
        parsed: Any = CONFIG_MAPPING[config["model_type"]].from_dict(config)  # fills in the family's defaults
        facts = _facts(parsed)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} must describe a LLaVA: {reason}") from error
    folder = folder.resolve()
    mean, std = image_statistics(folder)
    return Checkpoint(
        path=folder, name=path, mean=tuple(mean), std=tuple(std), digest=weights_digest(folder, config=stored), **facts
    )


def _facts(config: Any) -> dict[str, Any]:
    """The fields of `Checkpoint` that follow from transformers' configuration of a LLaVA."""
    vision, language = config.vision_config, config.text_config
    layers, feature = vision.num_hidden_layers, config.vision_feature_layer
    # A negative hidden state counts from the end: state 0 is the embedding, so `layers` layers have layers + 1 states.
    deepest = max(f if f >= 0 else layers + 1 + f for f in ([feature] if isinstance(feature, int) else feature))
    shape = VisionShape.from_config(vision, layers=deepest)
    keeps_class_token = vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
    tiled = config.image_grid_pinpoints if config.model_type == ANYRES else ()
    return {
        "family": config.model_type,
        "language": LanguageShape.from_config(language),
        "language_type": language.model_type,
        "vision": shape,
        "num_visual_tokens": shape.num_patches + keeps_class_token,
        "resolutions": tuple((height, width) for height, width in tiled),
        "image_token": config.image_token_index,
    }


def resolve_checkpoint(path: str, *, families: Sequence[str] = FAMILIES, key: str = "model.path") -> Path:
    """The local folder of a checkpoint: `path` itself, or the hub repository `owner/name` in the local hub cache.

    huggingface_hub downloads a repository that is not cached. `key` is the configuration key that errors name.

    Raises:
        CheckpointError: if there is no such folder or repository, or if it does not hold a complete checkpoint of one
            of `families` in Hugging Face format with safetensors weights.
    """
    return _find(path, families, key)[0]


def _find(path: str, families: Sequence[str], key: str) -> tuple[Path, bytes]:
    """The folder, and the bytes of its config.json, after checking the family and the weight files."""
    folder = Path(path)
    if not folder.is_dir():
        folder = _from_hub(path, key)
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"model.path must be a folder with a config.json, found none in {folder}")
    stored = file.read_bytes()
    try:
        config = json.loads(stored)
    except ValueError as error:
        raise CheckpointError(f"{file} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must hold an object, got {type(config).__name__}")
    family = config.get("model_type")
    if family not in families:
        raise CheckpointError(
            f"{key} must be a checkpoint of the families {', '.join(families)}, got model_type {family!r} in {file}"
        )
    _check_weights(folder)
    return folder, stored


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def weights_digest(folder: Path, *, config: bytes | None = None) -> str:
    """16 hex digits that change when the weights, the tokenizer or the configuration change.

    Of weight files above 64 MiB, the digest covers the size, the header, and the first, middle and last 4 KiB of each
    tensor. Training that changes a tensor changes these blocks, and the digest of a 14 GB model takes a fraction of a
    second. `config` holds the bytes of config.json if the caller has read them already.
    """
    digest = hashlib.sha256()
    small_files = [f for f in sorted(folder.iterdir()) if f.suffix in {".json", ".jinja", ".model"} and f.is_file()]
    for file in small_files + weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        if file.name == "config.json" and config is not None:
            digest.update(config)
            continue
        with file.open("rb") as stream:
            if size <= WHOLE_FILE_BYTES:
                digest.update(stream.read())
                continue
            header, begin = read_header(file)
            digest.update(json.dumps(header).encode())
            for start, stop in (tensor["data_offsets"] for tensor in header.values()):
                for offset in (start, (start + stop) // 2, max(start, stop - BLOCK_BYTES)):
                    stream.seek(begin + offset)
                    digest.update(stream.read(min(BLOCK_BYTES, stop - offset)))
    return digest.hexdigest()[:16]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file.

    Returns:
        {tensor name: its dtype, shape and data_offsets}, and the byte from which the offsets count.

    Raises:
        CheckpointError: if the file is not a safetensors file, or its size differs from what the header says.
    """
    with file.open("rb") as stream:
        # A safetensors file is 8 bytes with the length of the header, the header in JSON, and the data.
        begin = 8 + int.from_bytes(stream.read(8), "little")
        if begin > (size := file.stat().st_size):
            raise CheckpointError(f"{file} must be a whole safetensors file, got {size} bytes")
        try:
            header = json.loads(stream.read(begin - 8))
            header.pop("__metadata__", None)
            expected_size = begin + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise CheckpointError(f"{file} must be a safetensors file: {error}") from error
    if expected_size != size:
        raise CheckpointError(f"{file} must be a whole safetensors file of {expected_size} bytes, got {size}")
    return header, begin


def _check_weights(folder: Path) -> None:
    """Raises CheckpointError if weight files are missing, or truncated, as after an interrupted download."""
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"model.path must hold *.safetensors weights, found none in {folder}")
    if (folder / INDEX).is_file():
        listed = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        if absent := sorted(listed - {file.name for file in files}):
            raise CheckpointError(f"model.path must hold the {len(listed)} files of {INDEX}, found no {absent[0]}")
    for file in files:
        read_header(file)


def _from_hub(path: str, key: str) -> Path:
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise CheckpointError(f"{key} must be a folder or a hub repository `owner/name`, got {path!r}")
    from huggingface_hub import snapshot_download  # the import takes a second, and a local path does not need it

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the bases of huggingface_hub's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{key} {path!r} is neither a folder here ({os.getcwd()}) nor a hub repository in reach: {reason}"
        ) from error


def image_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel that the vision tower expects, for values in [0, 1].

    They are read from processor_config.json or preprocessor_config.json; if neither has them, they are CLIP's.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            stored = json.loads((folder / name).read_text())
            stored = stored.get("image_processor", stored)
            if "image_mean" in stored:
                return stored["image_mean"], stored["image_std"]
    return [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
