"""Train the demo's CLIP: a new text tower for the frozen vision tower of the demo model.

    python -m demo.train_clip --out runs/demo_clip [--steps 600]      # the same command resumes
    python -m demo.evaluate_clip --clip runs/demo_clip/clip           # evaluates it
    python jobs/caption_corpus.py prune.method=cdpruner prune.settings.clip=runs/demo_clip/clip

CDPruner's relevance needs the CLIP that the vision tower belongs to, and a LLaVA checkpoint holds no text tower. The
image embedding is the class token after the final normalisation and the projection. The loss is CLIP's symmetric
contrastive loss, applied twice: to references of whole scenes, and to short texts that name things in a scene.

The written folder does not hold the weights of the vision encoder, which are in the LLaVA checkpoint.
`demo.evaluate_clip.whole_clip` joins both.

Departures from CLIP:
- The vision tower was trained before, on other tasks, and is frozen: only its projection learns here.
- A short text may be true of several scenes of a batch. CLIP ignores such cases too, but in its data they are rare.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from demo.language import TASKS, question, references
from demo.model import HEAD_WIDTH, VISION_WIDTH, build_tokenizer, to_pixels
from demo.render import render
from demo.training import Stage, json_lines, run_stage
from demo.world import Scene, Shape, scene_at

SHIPPED = Path(__file__).resolve().parent / "clip"
LLAVA = SHIPPED.parent / "checkpoint"
FIRST_SCENE = 201 << 24  # training scenes of an unused seed, as in demo/train_m3.py
TEXT_WIDTH, TEXT_LAYERS, LONGEST = 128, 2, 34  # LONGEST: number of words in the longest text of demo.language
_END = "<end>"
_ENCODER = ("vision_model.embeddings.", "vision_model.pre_layrnorm.", "vision_model.encoder.")
_MAX_LOG_SCALE = 4.6052  # CLIP's: logits are at most 100 times the cosine


def train_clip(model_folder: Path, out: Path, *, stage: Stage, batch: int, cached: int) -> Path:
    """Runs or resumes the stage; returns the folder of the CLIP."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_text_tokenizer()
    clip = build_clip(tokenizer, model_folder)
    scenes = [scene_at("train", FIRST_SCENE + index) for index in range(cached)]
    features = see_scenes(clip, scenes)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([*stage.name.encode(), step])
        index = rng.choice(cached, batch, replace=False)
        drawn, text_rng = [scenes[number] for number in index], random.Random(int(rng.integers(1 << 62)))
        images = clip.visual_projection(features[torch.from_numpy(index)])
        whole = contrast(clip, images, embed(clip, tokenizer, [text_rng.choice(references(scene)) for scene in drawn]))
        short = contrast(clip, images, embed(clip, tokenizer, [short_text(scene, text_rng) for scene in drawn]))
        return whole + short, {"told": whole.item(), "named": short.item(), "scale": clip.logit_scale.exp().item()}

    run_stage(stage, nn.ModuleDict({"clip": clip}), loss_at, out, json_lines(out / "train.jsonl"))
    export_clip(clip, out / "clip")
    return out / "clip"


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer with a new token for the end of a text, where CLIP pools.

    The demo's `</s>` has id 2. transformers takes an end token of id 2 for an old configuration, and would then pool at
    the highest id instead of the end of the text.
    """
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": _END})
    tokenizer.padding_side = "right"
    begin, end = ((token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, _END))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A {_END}", special_tokens=[begin, end]
    )
    return tokenizer


def build_clip(tokenizer: PreTrainedTokenizerFast, model_folder: Path, seed: int = 0) -> CLIPModel:
    """A new text tower and new projections around the frozen tower of the LLaVA checkpoint in `model_folder`."""
    llava = LlavaForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_WIDTH // HEAD_WIDTH,
        "max_position_embeddings": LONGEST + 2,
        "projection_dim": VISION_WIDTH,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    vision = llava.config.vision_config.to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=VISION_WIDTH))
    clip.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
    clip.vision_model.requires_grad_(False)
    return clip


@torch.no_grad()
def see_scenes(clip: CLIPModel, scenes: list[Scene], batch: int = 16) -> Tensor:
    """Class tokens [scenes, W] after the final normalisation, which are the input of the projection."""
    groups = [scenes[start : start + batch] for start in range(0, len(scenes), batch)]
    pixels = (to_pixels(np.stack([render(scene).pixels for scene in group])) for group in groups)
    return torch.cat([clip.vision_model(pixel_values=batch_pixels).pooler_output for batch_pixels in pixels])


def short_text(scene: Scene, rng: random.Random) -> str:
    """The name of an item, or a question about the scene; none with the answer no, which may name a missing item."""
    if rng.random() < 0.5:
        item = rng.choice(scene.items)
        return item.phrase if isinstance(item, Shape) else f"the digit {item.value}"
    while True:
        pair = question(scene, rng.choice(TASKS), rng)
        if pair and pair[1] != "no":
            return pair[0]


def embed(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Text embeddings [texts, P]. Padding follows the end of a text, so causal attention never sees it."""
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    return clip.text_projection(clip.text_model(input_ids=ids).pooler_output)


def contrast(clip: CLIPModel, images_BP: Tensor, texts_BP: Tensor) -> Tensor:
    """CLIP's loss: each image among all texts and each text among all images."""
    scale = clip.logit_scale.clamp(max=_MAX_LOG_SCALE).exp()
    logits_BB = scale * F.normalize(images_BP, dim=-1) @ F.normalize(texts_BP, dim=-1).T
    own_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2


def export_clip(clip: CLIPModel, folder: Path) -> None:
    """Writes all weights except those of the vision encoder, in float16."""
    clip.config.architectures, clip.config.dtype = ["CLIPModel"], torch.float16
    clip.config.save_pretrained(folder)
    build_text_tokenizer().save_pretrained(folder)  # a new one: a used tokenizer saves its padding settings
    kept = {name: weight.half() for name, weight in clip.state_dict().items() if not name.startswith(_ENCODER)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_clip", description="Train the demo's CLIP.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=LLAVA)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=256, help="scenes of one step, each with two texts")
    parser.add_argument("--cached", type=int, default=6144, help="scenes to learn from")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    stage = Stage(name="clip", steps=arguments.steps, lr=2e-3, warmup=min(50, arguments.steps))
    folder = train_clip(arguments.model, arguments.out, stage=stage, batch=arguments.batch, cached=arguments.cached)
    print(f"clip {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
