"""What every distance promises: batches, dtypes, and errors."""

import importlib.util
import sys

import pytest
import torch
from torch import Tensor

from otprune.distance import exact_w2, gaussian_w2, sliced_w2, trace_objective

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64 throughout

needs_pot = pytest.mark.skipif(importlib.util.find_spec("ot") is None, reason="POT is not installed")


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def subsets(num_images: int, num_tokens: int, keep: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(num_tokens, generator=generator)[:keep] for _ in range(num_images)])


@needs_pot
@pytest.mark.parametrize("measure", [trace_objective, gaussian_w2, sliced_w2, exact_w2])
def test_a_batch_equals_its_images_alone(measure):
    features, idx = tokens(4, 25, 5), subsets(4, 25, 6)
    alone = torch.cat([measure(features[i : i + 1], idx[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(measure(features, idx), alone, **CLOSE)


@needs_pot
@pytest.mark.parametrize("measure", [trace_objective, gaussian_w2, sliced_w2, exact_w2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_features_are_measured_in_float64(measure, dtype):
    features, idx = (tokens(2, 25, 5) * 200).to(dtype), subsets(2, 25, 6)  # squares overflow float16
    actual = measure(features, idx)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, measure(features.double(), idx), rtol=0, atol=0)


@pytest.mark.parametrize("measure", [trace_objective, gaussian_w2, sliced_w2])
@pytest.mark.parametrize(
    ("features", "idx", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.long), "features must be floating"),
        (torch.zeros(1, 5, 3, dtype=torch.long), torch.tensor([[0, 1]]), "features must be floating"),
        (torch.zeros(1, 5, 3), torch.tensor([0, 1]), "idx must be integer"),
        (torch.zeros(1, 5, 3), torch.tensor([[0.0, 1.0]]), "idx must be integer"),
        (torch.zeros(2, 5, 3), torch.tensor([[0, 1]]), r"idx must be \[2, K >= 1\]"),
        (torch.zeros(1, 5, 3), torch.zeros(1, 0, dtype=torch.long), r"idx must be \[1, K >= 1\]"),
        (torch.zeros(1, 5, 3), torch.tensor([[0, 5]]), r"idx must be in \[0, 5\)"),
        (torch.zeros(1, 5, 3), torch.tensor([[-1, 2]]), r"idx must be in \[0, 5\)"),
        (torch.zeros(1, 5, 3), torch.tensor([[2, 0, 2]]), "got duplicates"),
        (torch.full((1, 5, 3), torch.nan), torch.tensor([[0, 1]]), "features must be finite"),
        (torch.full((1, 5, 3), torch.inf), torch.tensor([[0, 1]]), "features must be finite"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_it_got(measure, features, idx, message):
    with pytest.raises(ValueError, match=message):
        measure(features, idx)


def test_no_projections_is_a_value_error():
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sliced_w2(tokens(1, 5, 3), torch.tensor([[0, 1]]), projections=0)


def test_without_pot_exact_w2_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"otprune\[test\]"):
        exact_w2(tokens(1, 5, 3), torch.tensor([[0, 1]]))
