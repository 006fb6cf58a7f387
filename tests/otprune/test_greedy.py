"""The greedy itself: its two paths against log det by definition, and what each path must not depend on."""

import pytest
import torch
from torch import Tensor

from otprune import greedy
from otprune.greedy import greedy_from_kernel, greedy_logdet
from otprune.kernel import gram


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def greedy_by_definition(kernel: Tensor, k: int) -> list[int]:
    picked: list[int] = []
    for _ in range(k):
        gains = torch.full((len(kernel),), -torch.inf, dtype=kernel.dtype)
        for j in set(range(len(kernel))) - set(picked):
            subset = [*picked, j]
            gains[j] = torch.linalg.slogdet(kernel[subset][:, subset]).logabsdet
        picked.append(int(gains.argmax()))
    return picked


@pytest.mark.parametrize(("num_tokens", "rank", "k"), [(1, 1, 1), (30, 50, 30), (40, 6, 20), (25, 1, 3)])
@pytest.mark.parametrize("ridge", [1.0, 1e-3, 1e6])
def test_every_path_picks_in_the_order_of_the_definition(num_tokens, rank, k, ridge, monkeypatch):
    factor = randn(3, num_tokens, rank)
    ridges = torch.full((3,), ridge, dtype=torch.float64)
    eye = torch.eye(num_tokens, dtype=torch.float64)
    expected = [greedy_by_definition(ridge * eye + f @ f.T, k) for f in factor]
    assert greedy_logdet(factor, ridges, k).tolist() == expected
    assert greedy_from_kernel(factor @ factor.mT, ridges, k).tolist() == expected
    for ahead in (1, 4, 64):
        monkeypatch.setattr(greedy, "AHEAD", ahead)
        assert greedy_logdet(factor, ridges, k).tolist() == expected


def test_a_symmetric_factor_is_multiplied_by_its_rows():
    tokens = randn(2, 60, 8).float()
    factor, ridges = tokens @ tokens.mT, torch.tensor([1.0, 50.0])
    picks = greedy_logdet(factor, ridges, 30, symmetric=True)
    assert picks.tolist() == greedy_from_kernel(factor @ factor, ridges, 30).tolist()


def test_each_image_has_its_own_ridge():
    factor = randn(1, 30, 4).repeat(2, 1, 1)
    ridges = torch.tensor([1e-4, 1e4], dtype=torch.float64)
    together = greedy_logdet(factor, ridges, 8)
    assert together.tolist() == greedy_from_kernel(factor @ factor.mT, ridges, 8).tolist()
    assert together[0].tolist() != together[1].tolist()


@pytest.mark.parametrize("ahead", [1, 5, 32])
def test_a_ridge_of_zero_still_gives_distinct_picks_beyond_the_rank(ahead, monkeypatch):
    monkeypatch.setattr(greedy, "AHEAD", ahead)
    factor = randn(1, 20, 3).float()
    for picks in (greedy_logdet(factor, torch.zeros(1), 20), greedy_from_kernel(gram(factor), torch.zeros(1), 20)):
        assert sorted(picks[0].tolist()) == list(range(20))


def test_ties_go_to_the_lowest_index_when_rows_are_computed_ahead(monkeypatch):
    """Without a ridge all arithmetic is exact; else the order of a dot product's sums would break ties."""
    monkeypatch.setattr(greedy, "AHEAD", 4)
    assert greedy_logdet(torch.ones(1, 50, 1), torch.zeros(1), 50)[0].tolist() == list(range(50))


def test_few_rows_are_computed_ahead_and_few_times(monkeypatch):
    """What makes it fast: reading the whole factor far fewer times than there are picks."""
    blocks = []
    take = greedy._RowsAhead.take

    def counted(self, pick, excess, num_left):
        row = take(self, pick, excess, num_left)
        blocks[:] = self.blocks
        return row

    monkeypatch.setattr(greedy._RowsAhead, "take", counted)
    greedy_logdet(randn(1, 400, 400).float(), torch.ones(1), 100)
    assert max(map(len, blocks)) <= greedy.AHEAD
    assert len(blocks) <= 25  # 100 without looking ahead
    assert sum(map(len, blocks)) <= 400


@pytest.mark.parametrize("num_tokens", [1, 5, 127, 128, 129, 300, 576, 1300])
def test_the_gram_of_blocks_is_the_gram(num_tokens):
    rows = randn(2, num_tokens, 7)
    assert torch.allclose(gram(rows), rows @ rows.mT, rtol=0, atol=1e-12)


def test_2880_tokens_need_little_memory_and_no_cubic_product():
    """LLaVA-1.6's length, at a width that keeps the test quick."""
    features = randn(1, 2880, 64).float()
    rows = gram(features)
    picks = greedy_logdet(rows, torch.full((1,), 100.0), 282)
    assert len(set(picks[0].tolist())) == 282
