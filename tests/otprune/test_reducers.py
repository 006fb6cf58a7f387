"""M3's pooling and PruMerge's choosing and merging, against their definitions, token by token."""

import numpy as np
import pytest
import torch

from otprune.methods.m3 import m3_grids, m3_pool
from otprune.methods.prumerge import EXTRA, NUM_NEIGHBOURS, prumerge


@pytest.fixture(scope="module")
def tokens():
    """Features [3, 64, 10], keys [3, 64, 6], attention [3, 64] with a long tail, as the class token's has."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(3, 64, generator=generator, dtype=torch.float64).mul(1.5).exp()
    return (
        torch.randn(3, 64, 10, generator=generator, dtype=torch.float64),
        torch.randn(3, 64, 6, generator=generator, dtype=torch.float64),
        attention / attention.sum(dim=1, keepdim=True) * 0.9,
    )


# M3


@pytest.mark.parametrize("side", [24, 16, 6, 5])
def test_any_divisor_of_the_grid_pools(side):
    features = torch.randn(2, side * side, 3, dtype=torch.float64)
    for grid in m3_grids(side * side):
        pooled = m3_pool(features, grid)
        assert pooled.shape == (2, grid * grid, 3)
        cell = side // grid
        for row in range(grid):
            for column in range(grid):
                inside = [(row * cell + y) * side + column * cell + x for y in range(cell) for x in range(cell)]
                torch.testing.assert_close(pooled[:, row * grid + column], features[:, inside].mean(dim=1))


def test_grids_are_the_divisors_of_the_side():
    assert m3_grids(256) == [1, 2, 4, 8, 16]
    assert {1, 3, 6, 12, 24} <= set(m3_grids(576))


def test_the_full_grid_is_the_image_itself_and_one_cell_its_mean():
    features = torch.randn(2, 16, 5)
    assert torch.equal(m3_pool(features, 4), features)
    torch.testing.assert_close(m3_pool(features, 1)[:, 0], features.mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pools_as_float32_does(dtype):
    features = torch.randn(1, 576, 8).to(dtype)
    pooled = m3_pool(features, 1)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, m3_pool(features.float(), 1).to(dtype))


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 16, 2), 3, r"grid must be one of \[1, 2, 4\] for 16 tokens, got 3"),
        ((1, 16, 2), 0, "grid must be one of"),
        ((1, 15, 2), 1, "square grid, got 15"),
        ((1, 0, 2), 1, "square grid, got 0"),
        ((16, 2), 1, r"\[images, tokens, width\]"),
    ],
)
def test_pooling_that_does_not_fit_is_refused(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        m3_pool(torch.zeros(shape), grid)


# PruMerge


def outliers(attention):
    first, third = np.percentile(attention, [25, 75])
    return [i for i, a in enumerate(attention) if a > third + 1.5 * (third - first)]


def uniform(num_tokens, num_outliers):
    return range(0, num_tokens - 1, int(int(num_tokens / num_outliers) / 3))


def merged_rows(features, keys, attention, chosen):
    """Each chosen token plus the attention-weighted sum of the 32 tokens most like it; then the rest's weighted sum."""
    features, keys, attention = features.numpy(), keys.numpy(), attention.numpy()
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    rows = []
    for i in chosen:
        others = sorted((j for j in range(len(keys)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        rows.append(features[i] + sum(attention[j] * features[j] for j in others[:NUM_NEIGHBOURS]))
    rows.append(sum(attention[j] * features[j] for j in range(len(keys)) if j not in chosen))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("plus", [False, True])
def test_prumerge_is_its_definition(tokens, plus):
    numbers = set()
    for merged, features, keys, attention in zip(prumerge(*tokens, plus=plus), *tokens, strict=True):
        chosen = outliers(attention.numpy())
        if plus:
            chosen = sorted({*chosen, *uniform(64, len(chosen))})
        assert merged.source.tolist() == [*chosen, EXTRA]
        torch.testing.assert_close(merged.features, merged_rows(features, keys, attention, chosen))
        numbers.add(len(chosen))
    assert len(numbers) > 1  # the rule adapts to the image


def test_a_given_number_takes_the_most_attended(tokens):
    features, keys, attention = tokens
    for merged, *image in zip(prumerge(*tokens, k=9), features, keys, attention, strict=True):
        chosen = sorted(np.argsort(-image[2].numpy())[:8].tolist())
        assert merged.source.tolist() == [*chosen, EXTRA]
        torch.testing.assert_close(merged.features, merged_rows(*image, chosen))


def test_choosing_every_token_leaves_nothing_for_the_extra_one(tokens):
    merged = prumerge(*tokens, k=65)[0]
    assert merged.source.tolist() == [*range(64), EXTRA]
    assert not merged.features[-1].any()


def test_without_an_outlier_the_most_attended_token_is_chosen():
    attention = torch.linspace(0.01, 0.02, 40)[None]
    merged = prumerge(torch.randn(1, 40, 4), torch.randn(1, 40, 4), attention)[0]
    assert merged.source.tolist() == [39, EXTRA]
    every_13th = prumerge(torch.randn(1, 40, 4), torch.randn(1, 40, 4), attention, plus=True)[0]
    assert every_13th.source.tolist() == [0, 13, 26, 39, EXTRA]


def test_a_small_image_merges_all_there_is():
    features, keys, attention = torch.randn(1, 5, 3), torch.randn(1, 5, 3), torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.5]])
    merged = prumerge(features, keys, attention)[0]
    assert merged.source.tolist() == [4, EXTRA]
    torch.testing.assert_close(merged.features[1], 0.1 * features[0, :4].sum(dim=0))
    torch.testing.assert_close(merged.features[0], features[0, 4] + merged.features[1])


def test_images_do_not_see_each_other(tokens):
    together = prumerge(*tokens, plus=True)
    for b, merged in enumerate(together):
        alone = prumerge(*(tensor[b : b + 1] for tensor in tokens), plus=True)[0]
        assert torch.equal(alone.source, merged.source)
        assert torch.equal(alone.features, merged.features)


def test_the_order_of_the_tokens_does_not_matter(tokens):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = prumerge(*(tensor[:, order] for tensor in tokens))
    for before, after in zip(prumerge(*tokens), shuffled, strict=True):
        back = order[after.source[:-1]].argsort()
        torch.testing.assert_close(after.features[:-1][back], before.features[:-1])
        torch.testing.assert_close(after.features[-1], before.features[-1])


def test_half_precision_is_merged_in_float32(tokens):
    features, keys, attention = (tensor.half() for tensor in tokens)
    merged = prumerge(features, keys, attention)[0]
    exact = prumerge(features.float(), keys.float(), attention.float())[0]
    assert torch.equal(merged.features, exact.features.half())


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({0: torch.zeros(64, 10)}, {}, "features must be"),
        ({1: torch.zeros(3, 63, 6)}, {}, r"keys must be \[3, 64, width\]"),
        ({2: torch.zeros(3, 63)}, {}, r"class_attention must be \[3, 64\]"),
        ({0: torch.full((3, 64, 10), torch.nan)}, {}, "features must be finite"),
        ({2: torch.ones(3, 64, dtype=torch.long)}, {}, "class_attention must be floating point"),
        ({}, {"k": 1}, r"k must be in \[2, 65\]"),
        ({}, {"k": 66}, r"k must be in \[2, 65\]"),
        ({}, {"k": 9, "plus": True}, "k must be None with plus"),
    ],
)
def test_input_that_does_not_fit_is_refused(tokens, change, settings, message):
    arguments = [change.get(place, tensor) for place, tensor in enumerate(tokens)]
    with pytest.raises(ValueError, match=message):
        prumerge(*arguments, **settings)
