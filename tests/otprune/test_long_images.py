"""Images with more tokens than `kernel.WHOLE_KERNEL`, whose selectors compute rows of their kernels as they pick."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from otprune import METHODS, greedy, kernel, select_tokens
from otprune.flops import selector_flops
from otprune.greedy import greedy_from_kernel, greedy_from_rows, greedy_logdet
from otprune.kernel import gram, product_diagonal, unit_columns
from otprune.methods.cdpruner import cdpruner
from otprune.methods.divprune import divprune
from otprune.methods.logdet_linear import logdet_linear
from otprune.methods.otprune import otprune


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(kind: str, num_tokens: int, width: int) -> Tensor:
    if kind == "random":
        return randn(2, num_tokens, width)
    return randn(2, num_tokens, 9) @ randn(9, width, seed=1) + 1 + 0.1 * randn(2, num_tokens, width, seed=2)


CHOICES = {
    "otprune": otprune,
    "otprune, paper": partial(otprune, gamma_scale="paper"),
    "otprune, trace": partial(otprune, gamma_scale="trace"),
    "otprune, centred": partial(otprune, centered=True),
    "logdet_linear": logdet_linear,
    "logdet_linear, centred": partial(logdet_linear, centered=True),
    "divprune": divprune,
    "cdpruner": lambda features, k: cdpruner(features, k, randn(*features.shape[:2], seed=7)),
}


@pytest.fixture
def long(monkeypatch):
    """Every image counts as long, and few rows are held at a time, so that some are dropped and computed again."""

    def make(ahead: int = 4) -> None:
        monkeypatch.setattr(kernel, "WHOLE_KERNEL", 0)
        monkeypatch.setattr(greedy, "AHEAD_OF_MANY", ahead)

    return make


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["random", "low rank and noise"])
@pytest.mark.parametrize(("num_tokens", "width", "k"), [(160, 48, 40), (70, 120, 24), (320, 160, 40)])
def test_in_float64_the_picks_and_their_order_are_those_of_the_whole_kernel(choice, kind, num_tokens, width, k, long):
    tokens = tokens_of(kind, num_tokens, width)
    expected = CHOICES[choice](tokens, k)
    for ahead in (1, 4, 64):
        long(ahead)
        assert torch.equal(CHOICES[choice](tokens, k), expected)


def log_det(tokens: Tensor, picks: Tensor, *, squared: bool, centered: bool) -> float:
    vectors = unit_columns(tokens[None], centered=centered)[0]
    linear = vectors @ vectors.T
    K = 0.01 * linear @ linear if squared else linear / linear.diagonal().mean()
    return float(torch.logdet(torch.eye(len(picks), dtype=torch.float64) + K[picks][:, picks]))


@pytest.mark.parametrize("method", ["otprune", "otprune_centered", "logdet_linear", "logdet_linear_centered"])
@pytest.mark.parametrize("kind", ["random", "low rank and noise"])
@pytest.mark.parametrize(("num_tokens", "width"), [(700, 64), (400, 900)])
def test_in_float32_the_log_det_is_that_of_the_whole_kernel(method, kind, num_tokens, width, long):
    tokens = tokens_of(kind, num_tokens, width)[:1]
    whole = select_tokens(tokens, num_tokens // 10, method=method)[0]
    long()
    rows = select_tokens(tokens.float(), num_tokens // 10, method=method)[0]
    squared, centered = method.startswith("otprune"), method.endswith("centered")
    values = [log_det(tokens[0], picks, squared=squared, centered=centered) for picks in (rows, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(1, 40, 10),
        torch.full((1, 40, 10), 1 / 3),
        randn(1, 4, 10).float().repeat(1, 10, 1),
        torch.cat([torch.zeros(1, 36, 10), randn(1, 4, 10).float()], dim=1),
        torch.zeros(1, 40, 0),
    ],
    ids=["zero", "constant", "duplicate", "mostly zero", "no width"],
)
def test_degenerate_tokens_give_distinct_ascending_picks(method, features, long):
    long()
    for k in (1, 9, 40):
        keep = select_tokens(features, k, method=method)
        assert keep.shape == (1, k)
        assert (keep.diff(dim=-1) > 0).all()


def test_exact_ties_go_to_the_lowest_index_as_in_short_images(long):
    twins = torch.eye(6).repeat(2, 1)[None]  # every pair (i, i + 6) is the same token, all orthogonal
    long()
    for method in ("otprune", "logdet_linear"):
        assert select_tokens(twins, 6, method=method).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert select_tokens(torch.zeros(1, 9, 3), 4, method="divprune").tolist() == [[0, 1, 2, 3]]
    assert greedy_logdet(torch.ones(1, 32, 1), torch.ones(1), 3)[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_a_long_image_with_a_bad_value_is_refused(method):
    features = torch.ones(1, kernel.WHOLE_KERNEL + 1, 3)
    for value, name in ((math.nan, "NaN"), (math.inf, "inf")):
        features[0, -1, 1] = value
        with pytest.raises(ValueError, match=f"features must be finite, got {name}"):
            select_tokens(features, 5, method=method)


@pytest.mark.parametrize("width", [7, 300, 600])
def test_the_diagonal_of_a_product_is_read_from_half_of_it(width):
    factor = randn(2, 50, width)
    middle = factor.mT @ factor
    expected = (factor @ middle @ factor.mT).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(product_diagonal(factor, middle), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("num_tokens", "rank", "k"), [(40, 50, 40), (60, 6, 30), (25, 1, 3)])
@pytest.mark.parametrize("ridge", [1.0, 1e-3])
def test_a_batch_that_computes_its_rows_picks_in_the_order_of_the_whole_kernel(num_tokens, rank, k, ridge):
    """The path of a GPU, run here on a CPU."""
    factor, ridges = randn(3, num_tokens, rank), ridge * torch.arange(1.0, 4.0, dtype=torch.float64)
    middle = gram(randn(3, rank, rank, seed=1))
    assert torch.equal(greedy_from_rows(factor, None, ridges, k), greedy_from_kernel(gram(factor), ridges, k))
    kernels = factor @ middle @ factor.mT
    assert torch.equal(greedy_from_rows(factor, middle, ridges, k), greedy_from_kernel(kernels, ridges, k))
    assert torch.equal(greedy_logdet(factor, ridges, k, middle_BRR=middle), greedy_from_kernel(kernels, ridges, k))


def test_a_batch_spreads_its_picks_as_one_image_does():
    unit = torch.nn.functional.normalize(randn(3, 80, 12), dim=-1)
    nearest = 1 - (unit @ unit.mT - 2 * torch.eye(80, dtype=torch.float64)).amax(dim=-1)
    assert torch.equal(greedy._max_min_batch(unit, nearest, 80), greedy.greedy_max_min(unit, nearest, 80))


def test_rows_that_were_dropped_are_computed_again(monkeypatch):
    """Rows held at once stay few, however many are computed."""
    monkeypatch.setattr(kernel, "WHOLE_KERNEL", 0)
    monkeypatch.setattr(greedy, "AHEAD_OF_MANY", 5)
    computed, held = [], []
    compute = greedy._RowsAhead._compute

    def counted(self, tokens, num_columns):
        computed.extend(tokens.tolist())
        held.append(sum(map(len, self.blocks)))
        return compute(self, tokens, num_columns)

    monkeypatch.setattr(greedy._RowsAhead, "_compute", counted)
    factor = randn(1, 200, 12)
    picks = greedy_logdet(factor, torch.ones(1, dtype=torch.float64), 100)
    assert torch.equal(picks, greedy_from_kernel(gram(factor), torch.ones(1, dtype=torch.float64), 100))
    assert len(computed) > len(set(computed))
    assert max(held) <= 2 * 5


def test_a_long_image_costs_the_same_algorithm_on_every_device():
    for method in ("otprune", "logdet_linear", "divprune", "cdpruner"):
        costs = [selector_flops(method, 16_384, 2048, 1606, on_cpu=on_cpu) for on_cpu in (False, True)]
        assert costs[0] == costs[1]
    by_rows, whole = (selector_flops("otprune", num, 64, 400, on_cpu=True) for num in (4097, 4096))
    assert by_rows < whole


MEMORY = """
import resource
import torch
from functools import partial
from otprune import METHODS, select_tokens
from otprune.methods.cdpruner import cdpruner

generator = torch.Generator().manual_seed(0)
features = torch.randn(1, 16_384, 32, generator=generator)
scores = torch.rand(1, 16_384, generator=generator)
choices = {name: name for name in METHODS} | {"cdpruner": partial(cdpruner, relevance=scores)}
for method in METHODS:
    select_tokens(features[:, :64], 8, method=method)  # loads what every call needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, method in choices.items():
    keep = select_tokens(features, 48, method=method)[0]
    assert keep.shape == (48,) and bool((keep.diff() > 0).all()), name
    print(name, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_no_selector_holds_a_matrix_of_all_pairs_of_16384_tokens():
    """Such a matrix is 1 GiB; rows of the kernel and blocks of cosines are 64 MiB each."""
    process = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    growth = {line.split()[0]: int(line.split()[1]) for line in process.stdout.splitlines()}
    assert set(growth) == {*METHODS, "cdpruner"}
    assert max(growth.values()) < 300, growth
