"""CDPruner (NeurIPS 2025): the greedy MAP of a determinantal point process conditioned on the prompt.

L = diag(r) S diag(r), where S is the cosine similarity of the projected tokens and r their relevance to the
instruction. The kept set is the greedy maximiser of log det L_C. Written from the paper's formulas
(github.com/Theia-4869/CDPruner).

Departures:
- The caller computes the relevance scores: CLIP's patch and text features belong to the model, not to a selector.
- The minimum and maximum of each image scale its relevance to [0, 1]; the released code takes those of the whole batch.
  Scores that are all equal become 1 instead of dividing by zero.
- A zero token has similarity 0 to everything instead of NaN. Once the picks have used up the rank of L, log det is
  minus infinity for every choice; the remaining picks follow the conditional variance at that point, ties to the lowest
  index.
"""

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
    weight_BN = _min_max(relevance.to(compute_dtype(features)))
    if theta is not None:
        weight_BN = torch.exp(theta / (2 * (1 - theta)) * weight_BN)
    unit_BND = torch.nn.functional.normalize(features.detach().to(weight_BN.dtype), dim=-1)
    # L = F F^T with the rows of F weighted by relevance, and no ridge.
    return greedy_logdet(unit_BND * weight_BN[..., None], torch.zeros_like(weight_BN[:, 0]), k)


def _min_max(relevance_BN: Tensor) -> Tensor:
    low_B1, high_B1 = relevance_BN.amin(dim=-1, keepdim=True), relevance_BN.amax(dim=-1, keepdim=True)
    span_B1 = high_B1 - low_B1
    return torch.where(span_B1 > 0, (relevance_BN - low_B1 + 1e-6) / span_B1, 1)


def _reduce(seen: Seen, k: int, *, theta: float | None, **of_relevance: Any) -> list[list[Reduced]]:
    """The choice for each prompt of each picture, in the order of `seen.prompts`."""
    assert seen.relevance is not None, "cdpruner requires relevance"
    owner = [picture for picture, prompts in enumerate(seen.prompts) for _ in prompts]
    choose = partial(cdpruner, relevance=seen.relevance, theta=theta)
    features = seen.features[owner]  # one row a prompt, as `relevance` has
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
