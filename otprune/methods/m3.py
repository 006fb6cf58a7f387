"""M3, matryoshka multimodal models (arXiv 2405.17430): average pooling of the grid of visual tokens.

M3 is a fine-tuned model that was trained on all its grids; pooling is only how it shortens its prompt. On a checkpoint
that was not trained so, this is another, training-free baseline, and results must be labelled "vanilla" pooling.

For any-res prompts pool each tile by itself, before newline rows and padding are put in.

Departures:
- Any grid that divides the full one; the paper has 1, 3, 6, 12 and 24 of 24. test_any_divisor_of_the_grid_pools
- Means are taken in float32 (float64 for float64) and returned in the features' dtype.

Shape suffixes: B images, N visual tokens (a square grid in raster order), D feature width.
"""

from math import isqrt

from torch import Tensor

from otprune.kernel import compute_dtype


def m3_pool(features_BND: Tensor, grid: int) -> Tensor:
    """[B, grid * grid, D]: the mean of each of grid x grid equal square cells, in raster order.

    Raises:
        ValueError: if features are not [images, tokens, width] of a square number of tokens, or `grid` does not
            divide their side.
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
    """Grids that `num_visual` tokens can be pooled to, ascending: the divisors of their side. 256 -> 1, 2, 4, 8, 16.

    Raises:
        ValueError: if `num_visual` is not a positive square.
    """
    side = isqrt(max(num_visual, 0))
    if num_visual < 1 or side * side != num_visual:
        raise ValueError(f"tokens must form a square grid, got {num_visual}")
    return [grid for grid in range(1, side + 1) if side % grid == 0]
