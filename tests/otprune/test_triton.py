"""The fused CUDA kernels against the PyTorch code: on the GPU where there is one, else under Triton's interpreter."""

import logging
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from otprune import greedy, kernel, select_tokens
from otprune.greedy import greedy_from_kernel
from otprune.kernel import gram, unit_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when a kernel is declared, Triton's own among them: if anything imported Triton before, import it afresh.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if f"{name}.".startswith("triton.") and "._C" not in name]:
        del sys.modules[name]

pytest.importorskip("triton", reason="Triton is not installed; CUDA builds of PyTorch bring it")
triton_greedy = pytest.importorskip("otprune.triton_greedy")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle_gram(features: Tensor, *, centered: bool) -> Tensor:
    return gram(unit_columns(features.cpu().double(), centered=centered))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 70, 33), (1, 1, 1), (1, 129, 64), (1, 300, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("centered", [False, True])
def test_the_token_gram_is_that_of_unit_columns_to_the_rounding_of_tf32(shape, dtype, centered):
    features = (randn(*shape) + 0.5).to(dtype)
    expected = oracle_gram(features, centered=centered)
    ours = triton_greedy.token_gram(features.to(DEVICE), centered=centered).cpu()
    # An operand is off by at most 2^-11 of itself, so an entry by 2^-10 of |v_i| |v_j|.
    norm = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((ours - expected).abs() <= 2**-10 * norm[:, :, None] * norm[:, None] + 1e-6).all()
    # The interpreter's products of a tile with itself are symmetric up to the order of sums, which differs by CPU.
    torch.testing.assert_close(ours, ours.mT, rtol=0, atol=1e-6)


def test_columns_without_energy_are_zero_as_in_pytorch():
    features = randn(1, 40, 12)
    features[..., 3] = 0
    features[..., 4] = 1 / 3  # constant: nothing once centred
    for centered in (False, True):
        ours = triton_greedy.token_gram(features.to(DEVICE), centered=centered).cpu()
        expected = oracle_gram(features.double(), centered=centered)
        assert torch.allclose(ours.double(), expected, atol=1e-3)


def test_strided_tokens_are_read_in_place():
    whole = randn(2, 30, 24)
    sliced = whole.to(DEVICE)[:, 1:, 3:19]
    ours = triton_greedy.token_gram(sliced, centered=False)
    assert torch.equal(ours, triton_greedy.token_gram(sliced.contiguous(), centered=False))
    turned = whole.to(DEVICE).mT
    assert torch.equal(
        triton_greedy.token_gram(turned, centered=False),
        triton_greedy.token_gram(turned.contiguous(), centered=False),
    )


def test_the_kernel_gram_keeps_float32():
    rows = randn(2, 150, 150)
    expected = rows.double() @ rows.double().mT
    assert torch.allclose(triton_greedy.gram(rows.to(DEVICE)).cpu().double(), expected, atol=1e-4)


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_every_block_of_the_triangle_is_found_with_a_root_that_is_off(ulps):
    num_rows = -(-4096 // 128)
    found = []
    for block in range(num_rows * (num_rows + 1) // 2):
        root = np.sqrt(np.float32(8) * np.float32(block) + np.float32(1))
        root = np.nextafter(root, np.float32(ulps * np.inf)) if ulps else root
        found.append(int(triton_greedy._triangle_row.fn(int((root - np.float32(1)) / np.float32(2)), block)))
    assert found == [row for row in range(num_rows) for _ in range(row + 1)]
    for row, block in ((500, 500 * 501 // 2), (500, 500 * 501 // 2 + 500)):
        assert [triton_greedy._triangle_row.fn(row + off, block) for off in (-1, 0, 1)] == [row] * 3


def test_without_a_c_compiler_there_are_no_fused_kernels(monkeypatch, caplog):
    monkeypatch.setattr(kernel, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: {"clang": "/bin/clang", "mycc": "/bin/mycc"}.get(name))
    possible = kernel._can_compile.__wrapped__
    for named, expected in ((None, True), ("mycc", True), ("nowhere", False), ("", False)):
        with monkeypatch.context() as patch:
            patch.delenv("CC", raising=False)
            if named is not None:
                patch.setenv("CC", named)
            assert possible() is expected
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    caplog.clear()
    kernel._can_compile.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not any(kernel._can_compile() for _ in range(3))
        assert ["no C compiler" in record.message for record in caplog.records] == [True]
    finally:
        kernel._can_compile.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("num_tokens", [2880, 4096])
def test_long_grams_have_every_block(num_tokens):
    features = randn(1, num_tokens, 96) + 0.3
    ours = triton_greedy.token_gram(features.to(DEVICE), centered=False).cpu()
    expected = oracle_gram(features, centered=False)
    norm = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((ours - expected).abs() <= 2**-10 * norm[:, :, None] * norm[:, None] + 1e-6).all()
    exact = features.double() @ features.double().mT
    assert torch.allclose(triton_greedy.gram(features.to(DEVICE)).cpu().double(), exact, atol=1e-3)


def test_values_are_rounded_to_the_nearest_tf32():
    """1 + 2^-11 lies halfway and goes to the even neighbour, 1; a little more goes up, where truncation would not."""
    values = torch.tensor([1 + 2**-11, 1 + 2**-11 + 2**-20, 1 + 3 * 2**-11, -(1 + 2**-11 + 2**-20)])
    rows = torch.zeros(1, 4, 4)
    rows[0].diagonal().copy_(values)
    mean, scale = torch.zeros(1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    squares = triton_greedy._gram(rows.to(DEVICE), mean, scale).cpu()[0].diagonal()
    rounded = torch.tensor([1, 1 + 2**-10, 1 + 2**-9, 1 + 2**-10])
    assert torch.equal(squares, rounded.square())


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "rank", "k"), [(1, 1, 1), (33, 40, 33), (200, 12, 20), (256, 192, 26)])
@pytest.mark.parametrize("ridge", [1.0, 100.0])
def test_the_fused_greedy_picks_in_the_order_of_the_pytorch_greedy(num_tokens, rank, k, ridge):
    kernels = gram(randn(3, num_tokens, rank))
    ridges = torch.tensor([ridge, 2 * ridge, 3 * ridge])
    expected = greedy_from_kernel(kernels, ridges, k)
    assert triton_greedy.greedy_from_kernel(kernels.to(DEVICE), ridges.to(DEVICE), k).tolist() == expected.tolist()


@pytest.mark.parametrize("kernels", [torch.zeros(1, 20, 20), torch.ones(1, 20, 20), torch.eye(20)[None]])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_ties_go_to_the_lowest_index_and_picks_stay_distinct(kernels, ridge):
    picks = triton_greedy.greedy_from_kernel(kernels.to(DEVICE), torch.tensor([ridge], device=DEVICE), 20)
    assert picks[0].tolist() == list(range(20))


def test_the_pytorch_code_hands_over_to_the_fused_kernels(monkeypatch):
    """The whole CUDA path of otprune, taken on whatever device this runs on."""
    for module in (kernel, greedy):
        monkeypatch.setattr(module, "fused", lambda values: triton_greedy)
    features = randn(2, 64, 48) + 0.3
    grams = kernel.token_gram(features.to(DEVICE), centered=True)
    picks = greedy_from_kernel(kernel.gram(grams), torch.full((2,), 2.0, device=DEVICE), 9).cpu()
    monkeypatch.undo()
    exact = oracle_gram(features, centered=True)
    best = greedy_from_kernel(exact @ exact, torch.full((2,), 2.0, dtype=torch.float64), 9)
    for G, ours, oracle in zip(exact, picks, best, strict=True):
        values = [torch.logdet(torch.eye(9).double() + G[p] @ G[p].T / 2) for p in (ours, oracle)]
        assert values[0] >= 0.9999 * values[1]


# Long sequences and large budgets; Triton's interpreter takes a minute for what a GPU does in milliseconds.
LARGE = [(2880, 282), (576, 576)] if DEVICE == "cuda" else [(2880, 96), (192, 192)]


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "k"), LARGE)
def test_long_sequences_and_large_budgets(num_tokens, k):
    kernels = gram(randn(1, num_tokens, 64))
    ridge = torch.ones(1)
    expected = greedy_from_kernel(kernels.double(), ridge.double(), k)[0]
    picks = triton_greedy.greedy_from_kernel(kernels.to(DEVICE), ridge.to(DEVICE), k)[0].cpu()
    assert picks.unique().numel() == k
    identity = torch.eye(k, dtype=torch.float64)
    ours, best = (torch.logdet(identity + kernels[0, p][:, p].double()) for p in (picks, expected))
    assert ours >= 0.9999 * best


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["otprune", "otprune_centered", "logdet_linear", "logdet_linear_centered"])
def test_on_a_gpu_the_front_door_reaches_the_objective_of_float64(method):
    features = randn(4, 576, 1024) + 0.3
    keep = select_tokens(features.to(DEVICE), 56, method=method).cpu()
    exact = select_tokens(features.double(), 56, method=method)
    grams = oracle_gram(features, centered=method.endswith("centered"))
    kernels = grams / grams.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    kernels = kernels if method.startswith("logdet") else 0.01 * grams @ grams
    for K, ours, best in zip(kernels, keep, exact, strict=True):
        values = [torch.logdet(torch.eye(56).double() + K[p][:, p]) for p in (ours, best)]
        assert values[0] >= 0.9999 * values[1]
