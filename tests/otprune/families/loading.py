"""Changes to a checkpoint's files, and both halves that load from them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from otprune.models import CheckpointError, load_decoder, load_encoder, read_checkpoint

CPU = {"dtype": torch.float32, "device": "cpu"}


def stored_names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Stores the weights under the names that `change` gives; None leaves a weight out."""
    file = folder / "model.safetensors"
    renamed = {change(name): tensor for name, tensor in load_file(file).items()}
    renamed.pop(None, None)
    save_file(renamed, file, {"format": "pt"})


def change_json(file: Path, **sections: dict) -> None:
    """Changes keys of a JSON file: of a section or, in the section `top`, of the whole."""
    stored = json.loads(file.read_text())
    for section, keys in sections.items():
        (stored if section == "top" else stored[section]).update(keys)
    file.write_text(json.dumps(stored))


def copied(folder: Path, target: Path, **keys: object) -> Path:
    """A copy of the checkpoint whose config.json says something else."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    change_json(target / "config.json", top=keys)
    return target


def refused(folder: Path, message: str) -> None:
    """Asserts that reading the checkpoint fails with one line that the pattern `message` finds."""
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def rows_and_answer(
    folder: Path, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (150, 260)
) -> tuple[torch.Tensor, str]:
    """Both halves at work on one picture."""
    checkpoint = read_checkpoint(str(folder))
    encoder = load_encoder(checkpoint, dtype=dtype, device="cpu")
    decoder = load_decoder(checkpoint, dtype=dtype, device="cpu")
    frame = checkpoint.geometry.frame(size)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, frame.shape, np.uint8))
    [[region]] = encoder.regions([pixels], [size], "joint")
    rows = region.features if region.rows is None else region.rows
    span, prompt = checkpoint.geometry.span(size, np.arange(len(rows)), checkpoint.image_token), "describe"
    encoded = decoder.encode_prompt(prompt)
    [completion] = decoder.generate([[(rows, span)]], [encoded], max_new_tokens=8)
    assert completion.num_prompt_tokens == len(span) + sum(map(len, encoded))
    return rows, completion.text


def assert_same_answer(folder: Path, expected: tuple[torch.Tensor, str]) -> None:
    rows, text = rows_and_answer(folder)
    assert torch.equal(rows, expected[0])
    assert text == expected[1] != ""


def in_layout_of_later_versions(name: str) -> str:
    """The name in a checkpoint that transformers 5 saves of a weight whose older name begins with its part."""
    inner = re.sub(r"^language_model\.(model\.)?", "language_model.", name)
    return re.sub(r"^(?!lm_head)", "model.", inner).replace("model.language_model.lm_head", "lm_head")
