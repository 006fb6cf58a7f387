"""Exact match of every answer by teacher forcing: the same result as greedy decoding at a tenth of its cost.

    python -m demo.evaluate --model demo/checkpoint --scenes 160 [--split validation] [--retention 0.1 --method otprune
        --gamma 0.5 --gamma-scale trace]

An answer matches if each of its tokens, the stop token included, is the most likely token after the right ones before
it. Greedy decoding writes the right answer exactly in this case. Prints one JSON object: exact match of each task;
"qa", the mean over tasks; "caption", exact match of captions; "caption_tokens", the share of caption tokens that are
right.
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
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from demo.language import TASKS
from demo.packing import NO_TARGET, answer_logits, pack, prefix_ids
from demo.render import render
from demo.train_language import ask, scene_features
from demo.world import GRID, SPLITS, Scene, scene_at
from otprune import num_kept, select_tokens

Select = Callable[[Tensor], Tensor]
_QUESTION_SEED = 77


@torch.inference_mode()
def evaluate(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    scenes: list[Scene],
    *,
    select: Select | None = None,
    batch: int = 16,
) -> dict[str, float]:
    """Exact match per task in [0, 1]; `select` maps projected tokens [B, N, D] to the indices [B, k] to keep."""
    rng = random.Random(_QUESTION_SEED)
    matches: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(scenes), batch):
        group = scenes[start : start + batch]
        features = scene_features(model, np.stack([render(scene).pixels for scene in group]))
        visual = model.model.multi_modal_projector(features)
        if select:
            kept = select(visual)
            visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        asked = [ask(scene, rng, extra=("exist", "attr")) for scene in group]
        packed = pack(asked, tokenizer, visual.shape[1])
        logits, is_target = answer_logits(model, prefix_ids(tokenizer), visual, packed)
        right = torch.zeros(is_target.shape, dtype=torch.bool)
        right[is_target.cpu()] = logits.argmax(1).cpu() == packed.targets[packed.targets != NO_TARGET]
        for row, questions in enumerate(asked):
            for number, (task, _, _) in enumerate(questions, start=1):
                tokens = right[row][(packed.segment[row] == number) & is_target[row].cpu()]
                matches[task].append(float(tokens.all()))
                if task == "caption":
                    matches["caption_tokens"].append(tokens.float().mean().item())
    scores = {task: float(np.mean(values)) for task, values in sorted(matches.items())}
    return {"qa": float(np.mean([scores[task] for task in TASKS if task in scores])), **scores, "scenes": len(scenes)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description="Exact match of every answer.")
    parser.add_argument("--model", type=Path, default=Path("demo/checkpoint"))
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--scenes", type=int, default=160)
    parser.add_argument("--retention", type=float, default=1.0)
    parser.add_argument("--method", default="otprune")
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--gamma-scale", default="trace")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    model = LlavaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoProcessor.from_pretrained(arguments.model).tokenizer
    scenes = [scene_at(arguments.split, index) for index in range(arguments.scenes)]
    select = None if arguments.retention == 1 else _selector(arguments)
    print(json.dumps(evaluate(model, tokenizer, scenes, select=select)))
    return 0


def _selector(arguments: argparse.Namespace) -> Select:
    settings = {"gamma": arguments.gamma, "gamma_scale": arguments.gamma_scale}
    keep = num_kept(arguments.retention, GRID**2)
    method = {"method": arguments.method, **(settings if arguments.method == "otprune" else {})}
    return lambda features: select_tokens(features, keep, **method)


if __name__ == "__main__":
    raise SystemExit(main())
