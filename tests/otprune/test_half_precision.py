"""The released float16 arithmetic of OTPrune and DivPrune, against the formulas in numpy's float16."""

import numpy as np
import pytest
import torch

from otprune import kernel, select_tokens

N, D, K = 40, 64, 12
half = np.float16


@pytest.fixture(scope="module")
def alike() -> torch.Tensor:
    """Tokens [4, N, D] that share most of their energy, as projected tokens of real towers do."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(4, N, D, generator=generator)
    return 0.1 * tokens + 3 * torch.randn(4, 1, D, generator=generator)


def otprune_in_float16(tokens: np.ndarray, k: int, gamma: float, columns: type = half) -> tuple[set[int], int]:
    """(picks, number of searches). Norms and Cholesky columns in float16, kernel and conditional variances in float32.
    No pick is masked; for tokens that are picked twice, another search goes on without the picks."""
    tokens = tokens.astype(half).astype(np.float32)
    tokens = tokens / np.sqrt((tokens**2).sum(axis=0)).astype(half).astype(np.float32)
    gram = tokens @ tokens.T
    matrix = np.eye(N, dtype=np.float32) + np.float32(gamma) * (gram @ gram.T)
    found, searches = set(), 0
    while len(found) < k:
        searches += 1
        matrix[list(found)], matrix[:, list(found)] = 0, 0
        variance = matrix.diagonal().copy()
        chol, picks = np.zeros((0, N), columns), [int(variance.argmax())]
        while len(picks) < k - len(found):
            pick = picks[-1]
            explained = (chol[:, pick].astype(np.float32) @ chol.astype(np.float32)).astype(columns)
            column = (matrix[pick] - explained.astype(np.float32)) / np.sqrt(variance[pick])
            chol = np.vstack([chol, column.astype(columns)])
            variance -= column**2
            if variance.max() < 0:
                break
            picks.append(int(variance.argmax()))
        found |= set(picks)
    return found, searches


@pytest.mark.parametrize(("gamma", "twice"), [(0.01, False), (100.0, True)])
def test_otprune_rounds_what_the_release_rounds(alike, gamma, twice):
    """At a large gamma rounding leaves picked tokens a variance above all others: they are picked again."""
    found = select_tokens(alike, K, gamma=gamma, precision="released")
    expected = [otprune_in_float16(tokens.numpy(), K, gamma) for tokens in alike]
    assert [set(picks) for picks in found.tolist()] == [picks for picks, _ in expected]
    assert any(searches > 1 for _, searches in expected) is twice


def test_the_rounded_columns_alone_change_picks(alike):
    """With everything else as in the release, columns in float32 keep what the default keeps."""
    default = [set(picks) for picks in select_tokens(alike, K, gamma=100.0).tolist()]
    exact = [otprune_in_float16(tokens.numpy(), K, 100.0, columns=np.float32)[0] for tokens in alike]
    rounded = [set(p) for p in select_tokens(alike, K, gamma=100.0, precision="released").tolist()]
    common = [sum(len(a & b) for a, b in zip(default, other, strict=True)) for other in (exact, rounded)]
    assert common[0] > common[1] + 4


def divprune_in_float16(tokens: np.ndarray, k: int) -> list[int]:
    """Max-min on distances in float16; a picked token is out."""
    tokens = tokens.astype(half)
    norm = np.sqrt((tokens.astype(np.float32) ** 2).sum(axis=1)).astype(half)
    unit = (tokens.astype(np.float32) / norm.astype(np.float32)[:, None]).astype(half).astype(np.float32)
    distance = half(1) - (unit @ unit.T).astype(half)
    picks = [int(np.sort(distance, axis=0)[1].argmax())]
    while len(picks) < k:
        nearest = distance[picks].min(axis=0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return sorted(picks)


def test_divprune_rounds_what_the_release_rounds(alike):
    found = select_tokens(alike, K, method="divprune", precision="released").tolist()
    assert found == [divprune_in_float16(tokens.numpy(), K) for tokens in alike]
    assert found != select_tokens(alike, K, method="divprune").tolist()


@pytest.mark.parametrize("method", ["otprune", "divprune"])
def test_batches_whole_images_and_zero_tokens(alike, method):
    together = select_tokens(alike, K, method=method, precision="released")
    for image, picks in zip(alike, together, strict=True):
        assert torch.equal(select_tokens(image[None], K, method=method, precision="released")[0], picks)
    assert select_tokens(alike, N, method=method, precision="released").tolist() == [list(range(N))] * 4
    empty = alike.clone()
    empty[:, 3:], empty[..., 5] = 0, 0
    assert select_tokens(empty, K, method=method, precision="released").shape == (4, K)


@pytest.mark.parametrize("method", ["otprune", "divprune"])
def test_long_images_are_refused(alike, method, monkeypatch):
    monkeypatch.setattr(kernel, "WHOLE_KERNEL", 39)
    with pytest.raises(ValueError, match=r"precision must be float32 above \d+ tokens, got released for 40"):
        select_tokens(alike, K, method=method, precision="released")
