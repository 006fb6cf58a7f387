"""M3, matryoshka multimodal models (arXiv 2405.17430): average pooling of the grid of visual tokens.

M3 is a model fine-tuned on all its grids, and pooling is how it shortens its prompt. On a checkpoint without this
training, pooling is a different, training-free baseline, and results must be labelled "vanilla" pooling.

For any-res prompts, pool each tile by itself, before newline tokens are added and padding is cut off.

Departures:
- Any grid that divides the full one is allowed; the paper has 1, 3, 6, 12 and 24 of 24.
  test_any_divisor_of_the_grid_pools
- Means are computed in float32 (float64 for float64) and returned in the features' dtype.

Shape suffixes: B images, N visual tokens (a square grid in raster order), D feature width.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from otprune.kernel import compute_dtype
from otprune.methods.base import BY_TOKENS, Reducer
from otprune.methods.reduction import Reduced, Seen
from otprune.methods.search import Search
from otprune.methods.settings import Setting


def m3_pool(features_BND: Tensor, grid: int) -> Tensor:
    """The mean of each of grid x grid equal square cells, [B, grid * grid, D], in raster order.

    Raises:
        ValueError: if features are not floating [B, N, D] with a square N, or `grid` does not divide the side.
    """
    if features_BND.ndim != 3 or not features_BND.is_floating_point():
        raise ValueError(
            f"features must be floating [images, tokens, width], got {features_BND.dtype} {list(features_BND.shape)}"
        )
    B, N, D = features_BND.shape
    grids = m3_grids(N)
    if grid not in grids:
        raise ValueError(f"grid must be one of {grids} for {N} tokens, got {grid}")
    cell = grids[-1] // grid
    cells = features_BND.to(compute_dtype(features_BND)).reshape(B, grid, cell, grid, cell, D)
    return cells.mean(dim=(2, 4)).reshape(B, grid * grid, D).to(features_BND.dtype)


def m3_grids(num_visual: int) -> list[int]:
    """The sides of the grids to which `num_visual` tokens can be pooled, ascending. 256 gives 1, 2, 4, 8, 16.

    Raises:
        ValueError: if `num_visual` is not a positive square.
    """
    side = isqrt(max(num_visual, 0))
    if num_visual < 1 or side * side != num_visual:
        raise ValueError(f"tokens must form a square grid, got {num_visual}")
    return [grid for grid in range(1, side + 1) if side % grid == 0]


def _reduce(seen: Seen, k: int, *, grid: int | None) -> list[list[Reduced]]:
    """The pooled tokens; the source of a pooled token is the token at the centre of its cell."""
    grids = m3_grids(seen.features.shape[1])
    side, grid = grids[-1], grid or next(candidate for candidate in grids if candidate**2 >= k)
    middle = torch.arange(grid) * (side // grid) + side // grid // 2
    source = (middle[:, None] * side + middle).flatten()
    return [[Reduced(features=features, source=source)] for features in m3_pool(seen.features, grid)]


def _fits(num_patches: int, *, grid: int | None) -> None:
    grids = m3_grids(num_patches)
    if grid is not None and grid not in grids:
        raise ValueError(f"settings.grid must be one of {grids} for this model, got {grid}")


def _match(search: Search) -> dict[str, Any]:
    """Searches the square grids that divide the full one."""
    return search.smallest([{"tokens": grid**2} for grid in m3_grids(search.num_visual)])


METHOD = Reducer(
    name="m3",
    reduce=_reduce,
    cost=lambda num_tokens, width, kept, on_cpu: num_tokens * width,
    counting=BY_TOKENS,
    keeps_grid=True,
    makes_tokens=True,
    fits=_fits,
    match=_match,
    settings={
        "grid": Setting(
            meaning="side of the pooled grid; null is the smallest with retention's number of tokens or more",
            kind="integer",
            low=1,
        )
    },
)
