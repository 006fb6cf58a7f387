"""PruMerge and PruMerge+ (arXiv 2403.15388): outliers of the class token's attention, each merged with its neighbours.

With features y_i, keys k_i and the class token's attention a_i of one image:

    chosen    a_i > Q3 + 1.5 (Q3 - Q1)                                      (quartiles of the image's own a)
    merged    y'_i = y_i + sum over the 32 tokens j != i with the most similar keys (cosine) of a_j y_j
    extra     sum over all tokens j that are not chosen of a_j y_j

PruMerge+ also chooses every s-th token 0, s, 2s, ... < N - 1, with s = floor(floor(N / number of outliers) / 3).

In the release, a and k come from the vision tower's last layer, taken as one head of full width:
a = softmax(q_class k^T / sqrt(width)) over all tokens, from which the class token's own entry is removed afterwards. y
is hidden state -2. The projector reads the merged tokens.

The number of tokens differs between images; the paper's averages are 5.5 % for PruMerge and a quarter for PruMerge+.
The cost is O(K N width) an image.

Departures:
- Tokens are in raster order, with the extra token last; the release orders them by attention and appends the uniform
  ones.
- Outliers are those of each image; the release pools the attention of a whole batch.
- At least the most attended token is chosen; the release yields the extra token alone, or divides by zero.
  test_without_an_outlier_the_most_attended_token_is_chosen
- Exactly the outliers are chosen; the release rounds their number through a float, which can lose one.
- `k` sets the number of tokens in place of the outlier rule, for comparisons at equal budgets.
- With fewer than 33 tokens all other tokens are neighbours, and a step s below 1 becomes 1; the release fails at both.
- Sums are float32 (float64 for float64) and returned in the features' dtype.

Shape suffixes: B images, N visual tokens, D feature width, K chosen tokens of one image.
"""

from functools import partial

import torch
from torch import Tensor

from otprune.kernel import compute_dtype
from otprune.methods.base import BY_TOKENS, Reducer
from otprune.methods.reduction import Reduced, Requirement, Seen
from otprune.methods.settings import Setting

NUM_NEIGHBOURS = 32
EXTRA = -1  # the source of the extra token


def prumerge(
    features_BND: Tensor, keys: Tensor, class_attention_BN: Tensor, *, k: int | None = None, plus: bool = False
) -> list[Reduced]:
    """The merged tokens of each image, K + 1 rows; the last row is the extra token, whose source is EXTRA.

    Args:
        features_BND: tokens to merge, any floating type.
        keys: [B, N, any width]; the neighbours of a token are those with the most similar keys.
        class_attention_BN: the class token's attention to each token.
        k: number of rows, the extra one included: the k - 1 most attended tokens are chosen. None is the outlier rule.
        plus: PruMerge+ instead of PruMerge.

    Raises:
        ValueError: on inconsistent shapes, values that are not floating or not finite, k outside [2, N + 1], or k with
            plus.
    """
    _check(features_BND, keys, class_attention_BN, k, plus)
    merged = []
    for features_ND, keys_ND, attention_N in zip(features_BND, keys, class_attention_BN, strict=True):
        attention_N = attention_N.to(compute_dtype(features_ND))
        chosen_N = _outliers(attention_N) if k is None else _most_attended(attention_N, k - 1)
        if plus:
            step = max(len(chosen_N) // int(chosen_N.sum()) // 3, 1)
            chosen_N[:-1:step] = True
        merged.append(_merge(features_ND, keys_ND, attention_N, chosen_N))
    return merged


def _outliers(attention_N: Tensor) -> Tensor:
    """The tokens above the upper fence of Tukey's box plot, bool [N]; the most attended token if there are none."""
    first, third = attention_N.quantile(attention_N.new_tensor([0.25, 0.75]))  # linear interpolation
    outside_N = attention_N > third + 1.5 * (third - first)
    return outside_N if bool(outside_N.any()) else _most_attended(attention_N, 1)


def _most_attended(attention_N: Tensor, number: int) -> Tensor:
    order_N = attention_N.argsort(descending=True, stable=True)  # stable: ties go to the lowest index
    return torch.zeros_like(attention_N, dtype=torch.bool).index_fill_(0, order_N[:number], True)


def _merge(features_ND: Tensor, keys_ND: Tensor, attention_N: Tensor, chosen_N: Tensor) -> Reduced:
    source_K = chosen_N.nonzero().squeeze(1)
    weighted_ND = features_ND.to(attention_N.dtype) * attention_N[:, None]
    unit_ND = torch.nn.functional.normalize(keys_ND.to(attention_N.dtype), dim=-1)
    similarity_KN = unit_ND[source_K] @ unit_ND.T
    similarity_KN.scatter_(1, source_K[:, None], -torch.inf)  # no token is its own neighbour
    order_KN = similarity_KN.argsort(dim=1, descending=True, stable=True)
    neighbours_KM = order_KN[:, : min(NUM_NEIGHBOURS, len(chosen_N) - 1)]
    merged_KD = features_ND[source_K].to(attention_N.dtype) + weighted_ND[neighbours_KM].sum(dim=1)
    extra_1D = weighted_ND[~chosen_N].sum(dim=0, keepdim=True)
    return Reduced(
        features=torch.cat([merged_KD, extra_1D]).to(features_ND.dtype),
        source=torch.cat([source_K, source_K.new_tensor([EXTRA])]),
    )


def _check(features_BND: Tensor, keys: Tensor, class_attention_BN: Tensor, k: int | None, plus: bool) -> None:
    if features_BND.ndim != 3 or features_BND.shape[1] < 1:
        raise ValueError(f"features must be [images, tokens, width], got shape {list(features_BND.shape)}")
    B, N, _ = features_BND.shape
    if keys.ndim != 3 or keys.shape[:2] != (B, N):
        raise ValueError(f"keys must be [{B}, {N}, width] as the features are, got {list(keys.shape)}")
    if class_attention_BN.shape != (B, N):
        raise ValueError(f"class_attention must be [{B}, {N}], got {list(class_attention_BN.shape)}")
    for name, tensor in (("features", features_BND), ("keys", keys), ("class_attention", class_attention_BN)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or inf")
    if k is not None and plus:
        raise ValueError(f"k must be None with plus, whose number follows from the attention, got {k}")
    if k is not None and not 2 <= k <= N + 1:
        raise ValueError(f"k must be in [2, {N + 1}], chosen tokens and the extra one, got {k}")


def _reduce(seen: Seen, k: int, *, adaptive: bool = False, plus: bool = False) -> list[list[Reduced]]:
    assert seen.keys is not None, "prumerge requires keys"
    assert seen.class_attention is not None, "prumerge requires class_attention"
    rows = None if plus or adaptive else max(k, 2)
    return [[reduced] for reduced in prumerge(seen.features, seen.keys, seen.class_attention, k=rows, plus=plus)]


def _cost(num_tokens: int, width: int, kept: int, on_cpu: bool) -> int:
    """Multiply-adds, with D the tower's width: (N + 2) D^2 + N D for the keys and the query of the layer whose
    attention is read, and for their scores; k N D for the cosines of the keys; 32 k D for the sums over neighbours."""
    attention_flops = (num_tokens + 2) * width**2 + num_tokens * width
    return attention_flops + kept * num_tokens * width + NUM_NEIGHBOURS * kept * width


_REQUIRES = frozenset[Requirement](("keys", "class_attention"))

PRUMERGE = Reducer(
    name="prumerge",
    reduce=_reduce,
    cost=_cost,
    requires=_REQUIRES,
    before_projector=True,
    makes_tokens=True,
    settings={
        "adaptive": Setting(
            meaning="each image's number of tokens by the outliers of its attention, not by retention",
            kind="flag",
            default=False,
        )
    },
)
PRUMERGE_PLUS = Reducer(
    name="prumerge_plus",
    reduce=partial(_reduce, plus=True),
    cost=_cost,
    requires=_REQUIRES,
    before_projector=True,
    makes_tokens=True,
    counting=BY_TOKENS,
)
