"""The cost of captioning an image under each pruning method, as the published tables count it and in full.

Unit: one multiply-add, which the pruning papers call a FLOP; 1 TFLOP = 1e12. Hardware FLOPs are twice these numbers.

Both counts use the formulas of `otprune.part_flops`:

- paper (`paper_table`): two FFN matrices and no system prompt, tower, projector, selector or head. This count
  reproduces the tables of DivPrune and OTPrune.
- true (`true_flops`): the three matrices that gated FFNs have, the whole prompt, and every other part.

Departures:
- DivPrune's Eq. 5 prints a minus before the n^2 d term; only plus reproduces its tables.
  test_the_published_tables_are_reproduced
- The paper count charges the rows that a FitPrune recipe deletes to the attention of their layer and not to its FFN,
  because the release removes them between the two: 16.87 % for the released recipe. The published 15.65 % charges the
  rows to neither. The true count charges both, because this package deletes the rows after the layer.
  test_fitprune_release_recipe, test_the_published_fitprune_row_charges_nothing_to_the_layer_that_deletes,
  test_methods_inside_the_model_cost_what_they_multiply
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from otprune.budget import match_flops
from otprune.methods import BeforeModel, Method, get_method
from otprune.methods.base import Sizes
from otprune.part_flops import count_tokens, decode_flops, prefill_flops, projector_flops, vision_flops
from otprune.shapes import MODELS, ModelShape

__all__ = [
    "PAPER_PROMPTS",
    "TrueFlops",
    "decode_flops",
    "match_flops",
    "paper_table",
    "prefill_flops",
    "projector_flops",
    "selector_flops",
    "true_flops",
    "vision_flops",
]

# Tokens of the bare task text (with BOS) of COCO, Flickr30k, GQA, MMBench, MME, MMMU, NoCaps, OK-VQA, POPE, ScienceQA
# and SEED-Bench, and LLaVA-1.6's mean visual tokens on each: the constants of the published tables.
TEXT_TOKENS = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
ANYRES_TOKENS = (2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116)
VIDEO_TEXT_TOKENS = (28, 63, 21, 38, 196)  # ActivityNet, SEED-Bench, VideoChatGPT, NextQA, EgoSchema
VIDEO_TOKENS = 8 * 144

PAPER_PROMPTS = {
    "llava-1.5-7b": tuple((576, text) for text in TEXT_TOKENS),
    "llava-1.5-13b": tuple((576, text) for text in TEXT_TOKENS),
    "llava-1.6-7b": tuple(zip(ANYRES_TOKENS, TEXT_TOKENS, strict=True)),
    "llava-next-video-7b": tuple((VIDEO_TOKENS, text) for text in VIDEO_TEXT_TOKENS),
}
"""(visual tokens, text tokens) of each benchmark behind a row of the published tables."""


def paper_table(
    model: str, method: str | Method, *, extra_text: int = 0, ffn_matrices: int = 2, **settings: Any
) -> tuple[float, float, float]:
    """(unpruned TFLOPs, pruned TFLOPs, ratio in percent) as the published tables count them: means over the benchmarks.

    The ratio is the mean of the benchmarks' ratios, not the ratio of the means.

    Args:
        model: one of PAPER_PROMPTS.
        method: a name or a record. The settings of its `visual_rows` follow as keywords; selectors take `retention`.
        extra_text: text tokens added to every prompt. The published lengths leave out 41 of LLaVA-1.5's.
        ffn_matrices: 2 in the published tables; the models have 3.

    Raises:
        ValueError: on an unknown model or method, or settings that the method does not take.
    """
    if model not in PAPER_PROMPTS:
        raise ValueError(f"model must be one of {', '.join(PAPER_PROMPTS)}, got {model!r}")
    shape, method = MODELS[model].language, get_method(method)
    full, pruned = [], []
    for num_visual, num_text in PAPER_PROMPTS[model]:
        rows = method.visual_rows(num_visual, shape.layers, as_released=True, **settings)
        text, as_published = num_text + extra_text, {"ffn_matrices": ffn_matrices, "head": False}
        full.append(prefill_flops(shape, text + num_visual, **as_published))
        pruned.append(prefill_flops(shape, text, visual=rows, **as_published))
    ratio = fmean(after / before for before, after in zip(full, pruned, strict=True))
    return fmean(full) / 1e12, fmean(pruned) / 1e12, 100 * ratio


@dataclass(frozen=True, kw_only=True)
class TrueFlops:
    """Multiply-adds of captioning one image, by part. `policy` is the cost of choosing the tokens."""

    vision: int
    projector: int
    policy: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.policy + self.prefill + self.decode


def true_flops(
    model: ModelShape,
    method: str | Method,
    *,
    num_text: int,
    num_visual: int | None = None,
    num_generated: int = 1,
    crops: int = 1,
    frame: tuple[int, int] | None = None,
    select_on_cpu: bool = False,
    **settings: Any,
) -> TrueFlops:
    """Multiply-adds of one image: tower, projector, choice of tokens, prefill with three FFN matrices, decoding.

    Args:
        num_text: prompt tokens that are not visual: conversation format, BOS and task text.
        num_visual: tokens that the method chooses from; None is all patches of all crops, or all tokens of the frame.
            Any-res models add newline tokens and drop padding, so their number differs.
        num_generated: generated tokens; 1 counts the prefill alone, which yields the first.
        crops: square images that the tower reads; 5 for LLaVA-1.6's 2 x 2 grid and overview.
        frame: (height, width) in pixels of what the tower reads, for a tower that takes pictures of any size.
        select_on_cpu: count the selector's CPU algorithm instead of the GPU's.

    Raises:
        ValueError: as `Method.visual_rows`, on an unknown method, and if a tower that takes pictures of any size gets
            no frame.
    """
    num_visual = count_tokens(model.vision, crops=crops, frame=frame) if num_visual is None else num_visual
    shape, method = model.language, get_method(method)
    rows = method.visual_rows(num_visual, shape.layers, **settings)
    early = method.before_projector  # the projector then reads only the tokens that are kept
    width = model.vision.hidden if early else shape.hidden
    sizes = Sizes(shape=shape, width=width, num_text=num_text, num_visual=num_visual, rows=rows)
    return TrueFlops(
        vision=vision_flops(model.vision, crops=crops, frame=frame),
        projector=projector_flops(model, crops=crops, frame=frame, num_tokens=rows[0][0] if early else None),
        policy=method.own_flops(sizes, settings, on_cpu=select_on_cpu),
        prefill=prefill_flops(shape, num_text, visual=rows),
        decode=decode_flops(shape, num_text, num_generated, visual=rows),
    )


def selector_flops(method: str | Method, num_tokens: int, width: int, keep: int, *, on_cpu: bool = False) -> int:
    """Multiply-adds of choosing `keep` of one image's `num_tokens` tokens before the language model, in this package.

    Each method's file gives its formula. The count gives no credit for the half of a symmetric Gram matrix that a CPU
    skips, and does not charge kernel rows that a CPU computes ahead of the picks (`otprune.greedy.AHEAD`) and never
    uses.

    Raises:
        ValueError: on an unknown method, or on one inside the model, whose cost depends on the model's
            shape.
    """
    method = get_method(method)
    if not isinstance(method, BeforeModel):
        raise ValueError(f"method must act before the language model, got {method.name!r}")
    return method.cost(num_tokens, width, keep, on_cpu)
