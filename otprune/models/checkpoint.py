"""Finds a checkpoint, reads the facts that a job needs, and computes a digest of the weights, without loading them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoTokenizer

from otprune.families import FAMILIES, Family, Geometry, ImageProcessor, Options
from otprune.families.family import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD
from otprune.shapes import LanguageShape, ModelShape, PatchVisionShape, VisionShape

WHOLE_FILE_BYTES = 64 * 2**20  # files up to this size are hashed completely
BLOCK_BYTES = 4096  # of larger files, three blocks of this size are hashed for each tensor
INDEX = "model.safetensors.index.json"
KEYS = ("model.", "decode.")  # begin the keys of options, and so the errors about them
OTHER_FORMATS = {"internvl_chat": "OpenGVLab/InternVL3-8B-hf"}
"""`model_type` of checkpoints that bring code of their own -> one in Hugging Face format."""


class CheckpointError(ValueError):
    """The path holds no checkpoint that this package can run."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The facts about a checkpoint that a job needs: numbers and names, no weights. It can be pickled."""

    path: Path  # the folder, absolute and with links resolved
    name: str  # as the user gave it
    family: str  # `model_type`, a key of FAMILIES
    language: LanguageShape
    language_type: str  # `model_type` of the language model
    max_length: int  # longest context, in tokens
    vision: VisionShape | PatchVisionShape  # up to the layer that the model reads
    geometry: Geometry  # of the pictures as the tower gets them
    whole_geometry: Geometry  # the same, unless the method sends smaller pictures
    options: Options  # with which the geometry was read; the checkpoint's own values in place of `auto` and None
    mean: tuple[float, ...]  # of each channel, for values in [0, 1]
    std: tuple[float, ...]
    image_token: int  # token id of an image's placeholder
    class_attention: bool  # whether the encoder can compute a class token's attention to the patches
    levels: int  # DeepStack levels; a row of the language model's input is (1 + levels) * hidden wide
    digest: str  # from `weights_digest`

    @property
    def record(self) -> Family:
        """The record of the family."""
        return FAMILIES[self.family]

    @property
    def shape(self) -> ModelShape:
        return ModelShape(vision=self.vision, language=self.language)

    @property
    def row_width(self) -> int:
        """Numbers that the language model gets for each visual token."""
        return self.language.hidden * (1 + self.levels)


def read_checkpoint(path: str, options: Options | None = None) -> Checkpoint:
    """The facts about the checkpoint at `path`, a local folder or a hub repository. config.json is read once.

    Raises:
        CheckpointError: as `resolve_checkpoint`, or if config.json does not describe a model of its family that can
            run with these options.
    """
    folder, stored = _find(path, tuple(FAMILIES), "model.path")
    config = json.loads(stored)
    tower = (config.get("vision_config") or {}).get("model_type", "")
    family = FAMILIES[config["model_type"]]
    processor = replace(image_processor(folder, tower), tokenizer=lambda: _open_tokenizer(folder, family.title))
    try:
        parsed: Any = CONFIG_MAPPING[family.name].from_dict(config)  # fills in the family's defaults
        facts = family.read(parsed, processor, options or Options())
        language = LanguageShape.from_config(parsed.text_config)
    except CheckpointError:  # says already which file is wrong
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        if reason.startswith(KEYS):  # the user's option is wrong, not the checkpoint
            raise CheckpointError(reason) from error
        raise CheckpointError(f"{folder / 'config.json'} must describe a model of {family.title}: {reason}") from error
    if options is not None and options.original_tiles and not facts.options.original_tiles:
        raise CheckpointError(f"model.original_tiles must be false: it is for LLaVA-1.6, got {family.title}")
    folder = folder.resolve()
    return Checkpoint(
        path=folder,
        name=path,
        family=family.name,
        language=language,
        language_type=parsed.text_config.model_type,
        max_length=parsed.text_config.max_position_embeddings,
        vision=facts.vision,
        geometry=facts.geometry,
        whole_geometry=facts.geometry,
        options=facts.options,
        mean=processor.mean,
        std=processor.std,
        image_token=facts.image_token,
        class_attention=facts.class_attention,
        levels=facts.levels,
        digest=weights_digest(folder, config=stored),
    )


def _open_tokenizer(folder: Path, title: str) -> Any:
    """transformers' tokenizer of a checkpoint of the family `title`.

    Raises:
        CheckpointError: if the folder holds none in tokenizer.json, the format that every engine reads.
    """
    try:
        if not (folder / "tokenizer.json").is_file():
            raise ValueError("found no tokenizer.json")
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} must hold the tokenizer of a {title}: {reason}") from error


def resolve_checkpoint(path: str, *, families: Sequence[str] = tuple(FAMILIES), key: str = "model.path") -> Path:
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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must hold an object, got {type(config).__name__}")
    family = config.get("model_type")
    if family in OTHER_FORMATS:
        raise CheckpointError(
            f"{key} must be a checkpoint in Hugging Face format, got model_type {family!r} in {file}, a format with "
            "code of its own; the same model in Hugging Face format has a name that ends in -hf or -HF, as "
            f"{OTHER_FORMATS[family]}"
        )
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
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file} must be a safetensors file: {error}") from error
    if expected_size != size:
        raise CheckpointError(f"{file} must be a whole safetensors file of {expected_size} bytes, got {size}")
    return header, begin


def _check_weights(folder: Path) -> None:
    """Raises CheckpointError if weight files are missing, truncated (as after a download that ended), or elsewhere."""
    for file in folder.iterdir():  # opening a pipe would wait for a writer
        if file.exists() and not file.is_file() and not file.is_dir():
            raise CheckpointError(f"model.path must hold files and folders, got {file}, which is neither")
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"model.path must hold *.safetensors weights, found none in {folder}{_pickles(folder)}")
    if (folder / INDEX).is_file():
        try:
            listed = {str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / INDEX} must be JSON with a weight_map: {error!r}") from error
        if foreign := sorted(name for name in listed if Path(name).name != name):
            raise CheckpointError(f"{folder / INDEX} must list files of its own folder, got {foreign[0]!r}")
        if absent := sorted(listed - {file.name for file in files}):
            raise CheckpointError(f"model.path must hold the {len(listed)} files of {INDEX}, found no {absent[0]}")
    for file in files:
        read_header(file)


def _pickles(folder: Path) -> str:
    """What to say about weights in a format that runs code of the checkpoint's as it is read."""
    others = [file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(folder.glob(suffix))]
    return f" but {others[0]}: pickled weights are programs and never read; convert them" if others else ""


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


def image_processor(folder: Path, tower: str = "") -> ImageProcessor:
    """The image processor in processor_config.json or preprocessor_config.json.

    Without statistics, it has those of the tower, whose `model_type` is `tower`: SigLIP's, which SmolVLM's and
    Idefics3's is, or else CLIP's.

    Raises:
        CheckpointError: if a file does not hold such settings.
    """
    settings: dict[str, Any] = {}
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if not file.is_file():
            continue
        try:
            stored = json.loads(file.read_text())
            settings = stored.get("image_processor", stored) or {}
            if "image_mean" in settings:
                mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
                return ImageProcessor(mean=mean, std=std, settings=settings)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} must hold the settings of an image processor: {error!r}") from error
    if tower.startswith(("siglip", "smolvlm", "idefics3")):
        return ImageProcessor(mean=SIGLIP_MEAN, std=SIGLIP_STD, settings=settings)
    return ImageProcessor(mean=CLIP_MEAN, std=CLIP_STD, settings=settings)
