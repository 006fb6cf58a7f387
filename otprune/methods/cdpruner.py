"""CDPruner (NeurIPS 2025): the greedy MAP of a determinantal point process conditioned on the prompt.

L = diag(r) S diag(r), where S is the cosine similarity of the projected tokens and r their relevance to the
instruction. The kept set is the greedy maximiser of log det L_C. Written from the paper's formulas
(github.com/Theia-4869/CDPruner).

The minimum and maximum over a picture scale its relevance to [0, 1]. Of a picture in crops (LLaVA-1.6), each crop keeps
its own set, but one minimum and one maximum scale all crops: a crop that has little to do with the instruction has low
weights everywhere.

Departures:
- The caller computes the relevance scores: CLIP's patch and text features belong to the model, not to a selector.
- The released code runs one picture at a time and scales over its batch. Here any batch gives what each picture gives
  alone. Scores that are all equal become 1 instead of dividing by zero.
- The released code cuts every picture for LLaVA-1.6 into 2 x 2 tiles; here the checkpoint's own rule chooses the tiles.
- A zero token has similarity 0 to everything instead of NaN. Once the picks have used up the rank of L, log det is
  minus infinity for every choice; the remaining picks follow the conditional variance at that point, ties to the lowest
  index.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from otprune.choice import choose_tokens
from otprune.greedy import greedy_logdet
from otprune.kernel import compute_dtype, forms_kernel
from otprune.methods.base import Reducer
from otprune.methods.reduction import Reduced, Seen, keep_rows
from otprune.methods.settings import Setting


def cdpruner(features: Tensor, k: int, relevance: Tensor, *, theta: float | None = None) -> Tensor:
    """Token indices int64 [B, k] in the order picked. O(N k (D + k)) time, O(N (D + k)) memory an image, on a CPU and
    for long images (`kernel.forms_kernel`).

    `functools.partial(cdpruner, relevance=scores)` is a method for `select_tokens`.

    Args:
        features: projected visual tokens [B, N, D].
        relevance: scores [B, N], finite, larger for tokens closer to the instruction, on any scale: the minimum and
            maximum of each image scale them to [0, 1]. CDPruner's own is the mean over text chunks of the negative
            cosine between a CLIP patch feature and the text (dense CLIP features are anti-aligned with text).
        theta: the weight of relevance against diversity, in [0, 1): r becomes exp(alpha r) with
            alpha = theta / (2 (1 - theta)); 0 is diversity alone. None uses r itself.

    Raises:
        ValueError: on relevance of another shape, or theta outside [0, 1).
    """
    if relevance.shape != features.shape[:2]:
        raise ValueError(f"relevance must be {list(features.shape[:2])}, got {list(relevance.shape)}")
    if theta is not None and not 0 <= theta < 1:
        raise ValueError(f"theta must be in [0, 1), got {theta}")
    return _weighted(features, k, _min_max(relevance.to(compute_dtype(features)), range(len(features))), theta)


def _weighted(features: Tensor, k: int, weight_BN: Tensor, theta: float | None) -> Tensor:
    if theta is not None:
        weight_BN = torch.exp(theta / (2 * (1 - theta)) * weight_BN)
    unit_BND = torch.nn.functional.normalize(features.detach().to(weight_BN.dtype), dim=-1)
    # L = F F^T with the rows of F weighted by relevance, and no ridge.
    return greedy_logdet(unit_BND * weight_BN[..., None], torch.zeros_like(weight_BN[:, 0]), k)


def _min_max(relevance_BN: Tensor, groups: Sequence[int]) -> Tensor:
    """The relevance scaled to [0, 1] over all rows of each group; `groups` names the group of each row from 0 on."""
    group_B = torch.tensor(groups, dtype=torch.int64, device=relevance_BN.device)
    extremes = relevance_BN.new_empty(max(groups, default=-1) + 1)
    low_G = extremes.fill_(torch.inf).scatter_reduce(0, group_B, relevance_BN.amin(dim=-1), "amin")
    high_G = extremes.fill_(-torch.inf).scatter_reduce(0, group_B, relevance_BN.amax(dim=-1), "amax")
    low_B1, span_B1 = low_G[group_B, None], (high_G - low_G)[group_B, None]
    return torch.where(span_B1 > 0, (relevance_BN - low_B1 + 1e-6) / span_B1, 1)


def _reduce(seen: Seen, k: int, *, theta: float | None, **of_relevance: Any) -> list[list[Reduced]]:
    """The choice for each prompt of each region, in the order of `seen.prompts`."""
    assert seen.relevance is not None, "cdpruner requires relevance"
    rows = [(region, number) for region, prompts in enumerate(seen.prompts) for number in range(len(prompts))]
    # One group for each prompt of each picture: the regions of a picture share its scale.
    pictures = seen.pictures or range(len(seen.prompts))
    names = [(pictures[region], number) for region, number in rows]
    group_of = {name: group for group, name in enumerate(dict.fromkeys(names))}
    features = seen.features[[region for region, _ in rows]]  # one row a prompt, as `relevance` has
    weight = _min_max(seen.relevance.to(compute_dtype(features)), [group_of[name] for name in names])
    choose = partial(_weighted, weight_BN=weight, theta=theta)
    kept = iter(keep_rows(features, choose_tokens(choose, features, k)))
    return [[next(kept) for _ in prompts] for prompts in seen.prompts]


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds: N^2 D for the kernel, or N D (k + 1) on a CPU and for long images; N D to compare the tokens with
    a prompt; and N k (k - 1) / 2 for the earlier Cholesky columns times the row of each pick.

    Not counted: CLIP's text tower, which runs once for each different prompt, and its projection of the patches.
    """
    by_rows = on_cpu or not forms_kernel(num_tokens)
    kernel = num_tokens * width * (kept + 1 if by_rows else num_tokens)
    return kernel + num_tokens * width + num_tokens * kept * (kept - 1) // 2


METHOD = Reducer(
    name="cdpruner",
    reduce=_reduce,
    cost=_cost,
    requires=frozenset(("relevance",)),
    settings={
        "relevance": Setting(
            meaning="to the prompt's CLIP text embedding, to its word embeddings in the language model, or none",
            kind="text",
            default="clip",
            choices=("clip", "words", "none"),
        ),
        "clip": Setting(meaning="CLIP checkpoint whose vision tower the model has", kind="text"),
        "theta": Setting(
            meaning="weight of relevance against diversity; null uses relevance itself", kind="number", low=0, below=1
        ),
    },
)
