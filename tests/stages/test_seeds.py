"""Seeds: the same for the same image whatever its company, and the values that captions were written with."""

import hashlib

import pytest
import torch

from pipelines.stages.seeds import image_seed, sampling_seed

SHA256 = hashlib.sha256(b"an image").hexdigest()


def test_the_seed_of_an_image_fits_a_tensor_and_differs_with_image_and_seed():
    seeds = {image_seed(hashlib.sha256(bytes([i])).hexdigest(), seed) for i in range(100) for seed in (0, 1, 2**61)}
    assert len(seeds) == 300
    torch.tensor(sorted(seeds), dtype=torch.int64)


def test_the_seed_of_an_answer_differs_with_image_prompt_and_seed():
    images = [hashlib.sha256(bytes([i])).hexdigest() for i in range(10)]
    seeds = {sampling_seed(image, prompt, seed) for image in images for prompt in range(10) for seed in range(10)}
    assert len(seeds) == 1000
    assert max(seeds) < 2**60


@pytest.mark.parametrize("seed", [0, 7])
def test_the_values_are_those_that_committed_captions_were_made_with(seed):
    """A resumed output must go on as it began: from the hash's first 15 hex digits (60 bits)."""
    assert image_seed(SHA256, seed) == (int(SHA256, 16) >> 196) + seed
    mixed = hashlib.sha256(bytes(f"{SHA256}:3:{seed}", "ascii")).digest()
    assert sampling_seed(SHA256, 3, seed) == int.from_bytes(mixed, "big") >> 196
