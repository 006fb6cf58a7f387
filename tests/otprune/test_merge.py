"""Leftovers merged into kept tokens, beside the formula written with loops."""

import pytest
import torch

from otprune.merge import merge_flops, merge_leftovers


def by_loops(rows, features, source, weight):
    clusters = {int(kept): [] for kept in source}
    for i in range(len(features)):
        cosines = {kept: torch.cosine_similarity(features[i], features[kept], dim=0).item() for kept in clusters}
        owner = i if i in clusters else max(cosines, key=lambda kept: cosines[kept])
        clusters[owner].append(i)
    return torch.stack(
        [(1 - weight) * rows[kept] + weight * rows[members].mean(dim=0) for kept, members in clusters.items()]
    )


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_each_leftover_goes_to_the_kept_token_that_is_most_like_it(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    rows = torch.randn(23, 9, generator=generator, dtype=torch.float64)
    source = torch.randperm(23, generator=generator)[:5].sort().values
    torch.testing.assert_close(
        merge_leftovers(rows, features, source, weight), by_loops(rows, features, source, weight)
    )


def test_with_weight_1_the_rows_are_the_nearest_that_the_clusters_can_have():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.0, 3.0]])
    merged = merge_leftovers(features, features, torch.tensor([0, 2]), 1.0)
    torch.testing.assert_close(merged, torch.stack([features[:2].mean(0), features[2:].mean(0)]))


def test_a_kept_token_stays_in_its_own_cluster_though_another_equals_it():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    assert merge_leftovers(rows, features, torch.tensor([0, 1]), 1.0)[1] == 2.0


def test_halves_are_merged_in_float32_and_bad_values_are_refused():
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    half = merge_leftovers(features.half(), features, torch.tensor([0, 7]), 1.0)
    exact = merge_leftovers(features, features, torch.tensor([0, 7]), 1.0)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], got 1.5"):
        merge_leftovers(features, features, torch.tensor([0]), 1.5)
    with pytest.raises(ValueError, match="rows must be 300 as the features are, got 2"):
        merge_leftovers(features[:2], features, torch.tensor([0]), 0.5)
    assert merge_flops(256, 25, 192) == 256 * 25 * 192
