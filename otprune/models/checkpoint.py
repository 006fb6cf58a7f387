"""Finding a checkpoint, reading what a job asks of it and naming its weights, without loading them."""

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
WHOLE_FILE_BYTES = 64 * 2**20  # weight files up to this size are hashed whole
BLOCK_BYTES = 4096  # of larger ones three blocks of each tensor
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """The path holds no checkpoint that this package can run."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a job asks of a LLaVA checkpoint: numbers and names, no weights. It pickles and travels to actors."""

    path: Path  # the folder, absolute and without links
    name: str  # as the user gave it
    family: str  # `model_type`, one of FAMILIES
    language: LanguageShape
    language_type: str  # `model_type` of the language model
    vision: VisionShape  # it ends at the layer that LLaVA reads
    num_visual_tokens: int  # of one square image, all kept
    mean: tuple[float, ...]  # of the three channels, of values in [0, 1]
    std: tuple[float, ...]
    resolutions: tuple[tuple[int, int], ...]  # (height, width) in pixels of LLaVA-1.6's tiled images; () without tiles
    image_token: int  # id of the placeholder of an image
    digest: str  # of `weights_digest`

    @property
    def shape(self) -> ModelShape:
        return ModelShape(vision=self.vision, language=self.language)

    @property
    def has_tiles(self) -> bool:
        """Whether it is a LLaVA-1.6, whose images have different numbers of tokens."""
        return self.family == ANYRES

    @property
    def most_visual_tokens(self) -> int:
        """Visual tokens of the largest image: of LLaVA-1.6 those of the most crops, without newlines and padding."""
        area = self.vision.image_size**2
        most_tiles = max((height * width // area for height, width in self.resolutions), default=0)
        return self.vision.num_patches * (1 + most_tiles)


def read_checkpoint(path: str) -> Checkpoint:
    """The checkpoint at `path`, a local folder or a hub repository; opens its config.json once.

    Raises:
        CheckpointError: as `resolve_checkpoint`, or if config.json describes no LLaVA.
    """
    folder, stored = _find(path, FAMILIES, "model.path")
    config = json.loads(stored)
    try:
        parsed: Any = CONFIG_MAPPING[config["model_type"]].from_dict(config)  # with the family's defaults
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
    """Fields of `Checkpoint` that transformers' configuration of a LLaVA decides."""
    vision, language = config.vision_config, config.text_config
    layers, feature = vision.num_hidden_layers, config.vision_feature_layer
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
    """Local folder of a checkpoint: `path` itself, or the hub repository `owner/name` in the local hub cache.

    A repository that is not cached yet is downloaded by huggingface_hub. `key` is what errors call the path.

    Raises:
        CheckpointError: if there is no such folder or repository, or it is no whole checkpoint of one of `families` in
            Hugging Face format with safetensors weights.
    """
    return _find(path, families, key)[0]


def _find(path: str, families: Sequence[str], key: str) -> tuple[Path, bytes]:
    """The folder, and the contents of its config.json, an object of one of the `families`."""
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
    return sorted(folder.glob("*.safetensors"))


def weights_digest(folder: Path, *, config: bytes | None = None) -> str:
    """16 hex digits that change when the weights, the tokenizer or the configuration change.

    Weight files above 64 MiB count by size, header and the first, middle and last 4 KiB of each tensor: training
    that touches a tensor touches them, and naming a 14 GB model takes a fraction of a second. `config` holds the bytes
    of config.json where they are read already.
    """
    digest = hashlib.sha256()
    small = [f for f in sorted(folder.iterdir()) if f.suffix in {".json", ".jinja", ".model"} and f.is_file()]
    for file in small + weight_files(folder):
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
    """Name -> dtype, shape and data_offsets of each tensor in a safetensors file; the byte that offsets count from.

    Raises:
        CheckpointError: if the file is no safetensors file, or shorter than its header says.
    """
    with file.open("rb") as stream:
        begin = 8 + int.from_bytes(stream.read(8), "little")
        if begin > (size := file.stat().st_size):
            raise CheckpointError(f"{file} must be a whole safetensors file, got {size} bytes")
        try:
            header = json.loads(stream.read(begin - 8))
            header.pop("__metadata__", None)
            need = begin + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise CheckpointError(f"{file} must be a safetensors file: {error}") from error
    if need != size:
        raise CheckpointError(f"{file} must be a whole safetensors file of {need} bytes, got {size}")
    return header, begin


def _check_weights(folder: Path) -> None:
    """Raises CheckpointError if weight files are absent, or cut short, as interrupted downloads leave them."""
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
    from huggingface_hub import snapshot_download  # imports take a second; a local path never needs it

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{key} {path!r} is neither a folder here ({os.getcwd()}) nor a hub repository in reach: {reason}"
        ) from error


def image_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the three channels (of values in [0, 1]) that the vision tower expects.

    From processor_config.json or preprocessor_config.json; CLIP's where neither says.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            stored = json.loads((folder / name).read_text())
            stored = stored.get("image_processor", stored)
            if "image_mean" in stored:
                return stored["image_mean"], stored["image_std"]
    return [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
