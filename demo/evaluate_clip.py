"""Evaluates the demo's CLIP: does a caption find its image, and which patches are relevant to a question?

    python -m demo.evaluate_clip [--clip demo/clip] [--scenes 500]

Prints one JSON object, on held-out scenes:

    top1       share of captions whose own image is the nearest of 100 images
    exist      AUC of an image's cosine to "is there a red star ?": scenes with a red star against the other scenes
    clip       AUC of CDPruner's relevance (the negative cosine) to "is there a red star ?" for the patches of that
               star: "all" against all other patches, "items" against patches of other shapes and digits. Below one
               half, patches are aligned with the text that names them; above it, they are anti-aligned
    words      the same for relevance to the question's word embeddings in the language model, which has no minus sign

Patches that an item only touches (`demo.labels`) are left out.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from demo import labels as lab
from demo.language import caption
from demo.render import render
from demo.train_clip import LLAVA, SHIPPED, embed, see_scenes
from demo.world import COLORS, KINDS, SPLITS, Scene, scene_at
from otprune.models import llava_encoder, read_checkpoint
from otprune.models.llava_encoder import LlavaEncoder
from otprune.models.relevance import ClipRelevance, WordRelevance

Relevance = Callable[[Tensor, Tensor, list[str]], Tensor]
AMONG = 100
ASK = "is there a {} {} ?"
PAIRS = [(color, kind) for color in COLORS for kind in KINDS]


def whole_clip(folder: Path = SHIPPED, model_folder: Path = LLAVA) -> CLIPModel:
    """The complete CLIP, float32: the weights from `demo.train_clip`, and the vision tower of the LLaVA checkpoint."""
    llava = LlavaForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    tower = {f"vision_model.{name}": weight for name, weight in llava.model.vision_tower.state_dict().items()}
    clip = CLIPModel(CLIPConfig.from_pretrained(folder))
    clip.load_state_dict({**tower, **load_file(folder / "model.safetensors")})
    return clip.float().eval()


@torch.inference_mode()
def unit_images(clip: CLIPModel, scenes: list[Scene]) -> Tensor:
    """Image embeddings of length 1, [scenes, P]."""
    return normalize(clip.visual_projection(see_scenes(clip, scenes)), dim=-1)


@torch.inference_mode()
def unit_texts(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Text embeddings of length 1, [texts, P]."""
    return normalize(embed(clip, tokenizer, texts), dim=-1)


def retrieval(texts: Tensor, images: Tensor, among: int = AMONG) -> float:
    """Share of texts [T, P] whose nearest image in a group of `among` has the same index. The rest is left out."""
    count = len(texts) // among * among
    groups = zip(texts[:count].split(among), images[:count].split(among), strict=True)
    right = [(text @ image.T).argmax(dim=1) == torch.arange(among) for text, image in groups]
    return torch.cat(right).float().mean().item()


def answering(questions: Tensor, images: Tensor, scenes: list[Scene]) -> float:
    """Mean AUC over (colour, kind) pairs of the question's cosine: scenes with the pair against scenes without."""
    aucs = []
    for question, pair in zip(questions, PAIRS, strict=True):
        yes = torch.tensor([pair in {(shape.color, shape.kind) for shape in scene.shapes} for scene in scenes])
        cosines = images @ question
        aucs.append(auc(cosines[yes], cosines[~yes]))
    return float(np.nanmean(aucs))  # NaN for a pair that is in no scene


def pointing(relevance: Relevance, encoder: LlavaEncoder, scenes: list[Scene]) -> dict[str, float]:
    """Mean AUC over all shapes of all scenes; the question names the colour and the kind of the shape."""
    found: dict[str, list[float]] = {"all": [], "items": []}
    for scene in scenes:
        drawing = render(scene)
        marks = torch.from_numpy(lab.patch_labels(scene, drawing.alpha))
        patches = encoder.patches(encoder.see(torch.from_numpy(drawing.pixels[None])))
        prompts = [ASK.format(shape.color, shape.kind) for shape in scene.shapes]
        repeated = patches.expand(len(prompts), -1, -1)
        for scores, shape in zip(relevance(repeated, encoder.project(repeated), prompts), scene.shapes, strict=True):
            named = shows(marks, shape.color, shape.kind)
            others = ~named & (marks[:, lab.KIND] != lab.IGNORE)
            found["all"].append(auc(scores[named], scores[others]))
            if (items := others & (marks[:, lab.KIND] != lab.NOTHING)).any():
                found["items"].append(auc(scores[named], scores[items]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def shows(marks: Tensor, color: str, kind: str) -> Tensor:
    """bool [N]: the patches of the shape with this colour and kind. A scene has at most one such shape."""
    return (marks[:, lab.COLOR] == list(COLORS).index(color)) & (marks[:, lab.KIND] == KINDS.index(kind))


def auc(inside: Tensor, outside: Tensor) -> float:
    """The probability that a score of `inside` is above a score of `outside`; ties count half."""
    above, level = (compare(inside[:, None], outside).float().mean() for compare in (torch.gt, torch.eq))
    return (above + level / 2).item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate_clip", description="Evaluate the demo's CLIP.")
    parser.add_argument("--clip", type=Path, default=SHIPPED)
    parser.add_argument("--model", type=Path, default=LLAVA)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    scenes = [scene_at(arguments.split, index) for index in range(arguments.scenes)]
    full_clip, tokenizer = whole_clip(arguments.clip, arguments.model), AutoTokenizer.from_pretrained(arguments.clip)
    images = unit_images(full_clip, scenes)
    top1 = retrieval(unit_texts(full_clip, tokenizer, [caption(scene) for scene in scenes]), images)
    exist = answering(unit_texts(full_clip, tokenizer, [ASK.format(*pair) for pair in PAIRS]), images, scenes)
    place = {"dtype": torch.float32, "device": "cpu"}
    encoder = llava_encoder.load(read_checkpoint(str(arguments.model)), **place)
    clip, words = ClipRelevance(arguments.clip, **place), WordRelevance(arguments.model, **place)
    aucs = {name: pointing(relevance, encoder, scenes) for name, relevance in (("clip", clip), ("words", words))}
    print(json.dumps({"top1": top1, "exist": exist, **aucs, "scenes": len(scenes)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
