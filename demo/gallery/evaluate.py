"""Exact match of every answer by teacher forcing: the same result as greedy decoding at a tenth of its cost.

    python -m demo.gallery.evaluate --model demo/gallery/checkpoint --scenes 160 [--split validation] [--retention 0.1
        --method otprune]

An answer matches if each of its tokens, the stop token included, is the most likely token after the right ones before
it. Prints one JSON object: exact match of each task; "qa", the mean over tasks; "long" and "short", exact match of the
captions; "long_tokens" and "short_tokens", the share of their tokens that are right.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from demo.gallery.language import TASKS
from demo.gallery.model import encode
from demo.gallery.packing import NO_TARGET, answer_logits, pack, prefix_ids
from demo.gallery.render import render
from demo.gallery.train_language import ask
from demo.gallery.world import Scene, scene_at
from demo.world import SPLITS
from otprune import num_kept, select_tokens

Select = Callable[[Tensor], Tensor]
_QUESTION_SEED = 77


@torch.inference_mode()
def evaluate(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    scenes: list[Scene],
    *,
    select: Select | None = None,
) -> dict[str, float]:
    """Exact match per task in [0, 1]; `select` maps visual tokens [1, N, D] to the indices [1, k] to keep."""
    rng = random.Random(_QUESTION_SEED)
    matches: dict[str, list[float]] = defaultdict(list)
    for scene in scenes:
        visual, _ = encode(model, np.stack([render(scene).pixels]))
        kept = select(visual) if select else torch.arange(visual.shape[1])[None]
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        asked = ask(scene, rng, extra=("exist", "attr"))
        packed = pack([asked], tokenizer, kept.cpu(), scene.columns, scene.rows)
        logits, is_target = answer_logits(model, prefix_ids(tokenizer), visual, packed)
        right = torch.zeros(is_target.shape, dtype=torch.bool)
        right[is_target.cpu()] = logits.argmax(1).cpu() == packed.targets[packed.targets != NO_TARGET]
        for number, (task, _, _) in enumerate(asked, start=1):
            tokens = right[0][(packed.segment[0] == number) & is_target[0].cpu()]
            matches[task].append(float(tokens.all()))
            if task in ("long", "short"):
                matches[f"{task}_tokens"].append(tokens.float().mean().item())
    scores = {task: float(np.mean(values)) for task, values in sorted(matches.items())}
    return {"qa": float(np.mean([scores[task] for task in TASKS if task in scores])), **scores, "scenes": len(scenes)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.gallery.evaluate", description="Exact match of every answer.")
    parser.add_argument("--model", type=Path, default=Path("demo/gallery/checkpoint"))
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--scenes", type=int, default=160)
    parser.add_argument("--retention", type=float, default=1.0)
    parser.add_argument("--method", default="otprune")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    scenes = [scene_at(arguments.split, index) for index in range(arguments.scenes)]
    settings = {"gamma": 0.5, "gamma_scale": "trace"} if arguments.method == "otprune" else {}

    def select(visual: Tensor) -> Tensor:
        keep = num_kept(arguments.retention, visual.shape[1])
        return select_tokens(visual, keep, method=arguments.method, **settings)

    print(json.dumps(evaluate(model, tokenizer, scenes, select=None if arguments.retention == 1 else select)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
