"""Finding a checkpoint, reading its configuration and naming its weights, without loading them."""

import hashlib
import json
import os
from pathlib import Path

FAMILIES = ("llava",)
WHOLE_FILE_BYTES = 64 * 2**20  # weight files up to this size are hashed whole
NUM_BLOCKS, BLOCK_BYTES = 64, 64 * 2**10  # larger ones by this many evenly spaced blocks


class CheckpointError(ValueError):
    """The path holds no checkpoint that this package can run."""


def resolve_checkpoint(path: str) -> Path:
    """Local folder of a checkpoint: `path` itself, or the hub repository `owner/name` in the local hub cache.

    A repository that is not cached yet is downloaded by huggingface_hub.

    Raises:
        CheckpointError: if there is no such folder or repository, or it is no LLaVA checkpoint in
            Hugging Face format with safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _from_hub(path)
    config = read_config(folder)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"model.path must be a checkpoint of the families {', '.join(FAMILIES)}, "
            f"got model_type {family!r} in {folder / 'config.json'}"
        )
    if not weight_files(folder):
        raise CheckpointError(f"model.path must hold *.safetensors weights, found none in {folder}")
    return folder


def read_config(folder: Path) -> dict:
    """The checkpoint's config.json as a dict.

    Raises:
        CheckpointError: if the file is absent or not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"model.path must be a folder with a config.json, found none in {folder}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} must be JSON: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def weights_digest(folder: Path) -> str:
    """16 hex digits that change when the weights, the tokenizer or the configuration change.

    Weight files above 64 MiB count by size, first MiB (the safetensors header) and 64 evenly spaced
    64 KiB blocks, so that naming a 14 GB model takes a fraction of a second.
    """
    digest = hashlib.sha256()
    small = [f for f in sorted(folder.iterdir()) if f.suffix in {".json", ".jinja", ".model"} and f.is_file()]
    for file in small + weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_FILE_BYTES:
                digest.update(stream.read())
                continue
            digest.update(stream.read(2**20))
            for block in range(NUM_BLOCKS):
                stream.seek(size * block // NUM_BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _from_hub(path: str) -> Path:
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise CheckpointError(f"model.path must be a folder or a hub repository `owner/name`, got {path!r}")
    from huggingface_hub import snapshot_download  # imports take a second; a local path never needs it

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model.path {path!r} is neither a folder here ({os.getcwd()}) nor a hub repository in reach: {reason}"
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
