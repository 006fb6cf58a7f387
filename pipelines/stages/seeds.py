"""Seeds for random selection and for sampling. A seed depends on an image's bytes, never on its unit or its batch.

So a retried unit draws the same random numbers, in other batches and on another device too. The two functions follow
different rules. Their values are part of the output: another seed gives another caption.
"""

import hashlib


def image_seed(sha256: str, seed: int) -> int:
    """Seed, in [0, 2^62), for a random selection of one image's tokens.

    `sha256` is the hash of the image's bytes in hex. `seed` is `prune.seed`, plus the number of the picture if an image
    has several. The result is the first 15 hex digits plus `seed`, so consecutive seeds of an image differ.
    """
    return (int(sha256[:15], 16) + seed) % 2**62


def sampling_seed(sha256: str, prompt: int, seed: int, attempt: int = 0) -> int:
    """Seed, in [0, 2^60), for sampling one answer.

    `sha256` is the hash of the image's bytes in hex, `prompt` the index of the prompt among the image's prompts, and
    `seed` is `generate.seed`. A further attempt at the same answer counts on from 1. The result is a hash of all of
    them: a sum could give prompts of different images the same seed.
    """
    again = f":{attempt}" if attempt else ""
    return int(hashlib.sha256(f"{sha256}:{prompt}:{seed}{again}".encode()).hexdigest()[:15], 16)
