"""Seeds of what is random about an image: from its bytes, never from its unit or its batch.

So a unit that runs again, in other company and on another device, draws the same. The two rules differ, and the values
of both are part of the output: another value is another caption.
"""

import hashlib


def image_seed(sha256: str, seed: int) -> int:
    """Seed, in [0, 2^62), of the random selection of one image's tokens.

    Depends on the image's bytes (`sha256` in hex) and on `seed`: `prune.seed`, plus the picture's number where an image
    has several. The first 15 hex digits plus `seed`, so consecutive seeds of an image differ.
    """
    return (int(sha256[:15], 16) + seed) % 2**62


def sampling_seed(sha256: str, prompt: int, seed: int) -> int:
    """Seed, in [0, 2^60), of one sampled answer.

    Depends on the image's bytes (`sha256` in hex), the number of the prompt among the image's, and on `generate.seed`.
    A hash of the three, since a sum would give two prompts of two images the same seed.
    """
    return int(hashlib.sha256(f"{sha256}:{prompt}:{seed}".encode()).hexdigest()[:15], 16)
