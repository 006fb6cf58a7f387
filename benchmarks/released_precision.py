"""How many tokens the released float16 of OTPrune and DivPrune keeps that float32 keeps too.

    python benchmarks/released_precision.py

Takes about a minute on one core. Tokens are independent normals plus one vector that all tokens of an image share; the
share of energy in that vector is the case. The last line is JSON: for each share and method, the common tokens of each
image, of 56 kept of 576 at width 4096.
"""

import json

import torch

from otprune import select_tokens

TOKENS, WIDTH, KEPT, IMAGES = 576, 4096, 56, 5
SHARES = (0.0, 0.2, 0.5, 0.8, 0.9)


def common(features: torch.Tensor, method: str) -> list[int]:
    chosen = [select_tokens(features, KEPT, method=method, precision=p).tolist() for p in ("float32", "released")]
    return [len(set(one) & set(other)) for one, other in zip(*chosen, strict=True)]


def main() -> None:
    results = []
    for share in SHARES:
        generator = torch.Generator().manual_seed(7)
        own = torch.randn(IMAGES, TOKENS, WIDTH, generator=generator)
        shared = torch.randn(IMAGES, 1, WIDTH, generator=generator)
        features = (1 - share) ** 0.5 * own + share**0.5 * shared
        row = {"share": share, **{method: common(features, method) for method in ("otprune", "divprune")}}
        results.append(row)
        print(row, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
