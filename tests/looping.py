"""The demo checkpoint made to loop: its end token is unlikely, so that many captions go on and repeat themselves."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

END = 2  # id of the end token
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def make_looping(demo_model: Path, folder: Path, end: float = 0.3) -> Path:
    """A copy of the checkpoint with a head of its own, in which the end token has `end` times its logit."""
    shutil.copytree(demo_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = weights[EMBEDDINGS].clone()
    weights[HEAD][END] *= end
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder
