"""How precise OTPrune's two matrix products must be: rounds their operands on a CPU as hardware rounds them.

    python benchmarks/gram_precision.py

Takes about five minutes on one core. For every kind of tokens, size, seed and gamma, compares the greedy set from
rounded products with the greedy set in float64: the ratio of their log-determinants, computed in float64, and whether
any token changed. A precision is a pair: of the tokens' product G = V V^T, and of the kernel's product G G^T. Sums are
exact, so that only the rounding of operands matters. The last line is JSON: for each pair the worst ratio, the number
of ratios below 0.9999 and the number of sets that changed.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from otprune.greedy import greedy_from_kernel

CASES = [(576, 4096, 56, 1), (576, 1024, 56, 8), (256, 192, 26, 8)]  # N, D, k, seeds


def rounded(values: Tensor, bits: int) -> Tensor:
    """Rounds to `bits` explicit bits of mantissa, ties to even, as float32. 10 bits are TF32, 7 are bfloat16."""
    drop = 23 - bits
    # On the integer of a float32, adding just under half of the last kept bit carries into mantissa and exponent as
    # rounding does. The kept bit itself is added to break ties to even.
    raw = values.float().contiguous().view(torch.int32)
    raw = (raw + (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)) >> drop << drop
    return raw.view(torch.float32)


def truncated(values: Tensor) -> Tensor:
    """A float32 as tensor cores read it in TF32: they ignore its last 13 bits."""
    return (values.float().contiguous().view(torch.int32) >> 13 << 13).view(torch.float32)


def product(rows: Tensor) -> Tensor:
    return (rows.double() @ rows.double().T).float()


def bf16x3(rows: Tensor) -> Tensor:
    """The product from three bfloat16 products: operands are split into high and low parts; low x low is dropped."""
    high = rounded(rows, 7)
    low = rounded(rows.float() - high, 7)
    cross = high.double() @ low.double().T
    return (high.double() @ high.double().T + cross + cross.T).float()


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda rows: rows.float() @ rows.float().T,
    "bf16x3": bf16x3,
    "tf32": lambda rows: product(rounded(rows, 10)),
    "tf32 truncated": lambda rows: product(truncated(rows)),
    "bf16": lambda rows: product(rounded(rows, 7)),
    "bf16 in and out": lambda rows: rounded(product(rounded(rows, 7)), 7),
}
PAIRS = [
    *((name, name) for name in PRODUCTS),
    *(("tf32", "bf16x3"), ("tf32 truncated", "bf16x3"), ("bf16", "bf16x3"), ("bf16x3", "tf32")),
]


def token_sets(num_tokens: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres, member = (
        randn(num_tokens // 12, width),
        torch.randint(0, num_tokens // 12, (num_tokens,), generator=generator),
    )
    falling = torch.arange(1, 257, dtype=torch.float64) ** -0.5
    outliers = randn(num_tokens, width)
    outliers[::48] *= 30
    return {
        "iid": randn(num_tokens, width),
        "low rank": randn(num_tokens, 20) @ randn(20, width) + 0.1 * randn(num_tokens, width),
        "clustered": centres[member] + 0.3 * randn(num_tokens, width),
        "falling spectrum": randn(num_tokens, 256) * falling @ randn(256, width) + 0.1 * randn(num_tokens, width),
        "large mean": randn(num_tokens, width) + 5 * randn(width),
        "outlier norms": outliers,
    }


def logdet(gram: Tensor, gamma: float, subset: Tensor) -> float:
    rows = gram[subset]
    return float(torch.linalg.slogdet(torch.eye(len(subset)).double() + gamma * rows @ rows.T).logabsdet)


def main() -> None:
    ratios: dict[str, list[float]] = {f"{first}, {second}": [] for first, second in PAIRS}
    for num_tokens, width, k, num_seeds in CASES:
        for seed in range(num_seeds):
            for kind, tokens in token_sets(num_tokens, width, seed).items():
                tokens = tokens / tokens.norm(dim=0)
                gram = tokens @ tokens.T
                for scale, gamma in {"released": 0.01, "trace": 0.5 * (num_tokens / width) ** 2}.items():
                    ridge = torch.full((1,), 1 / gamma, dtype=torch.float64)
                    exact = logdet(gram, gamma, greedy_from_kernel((gram @ gram.T)[None], ridge, k)[0])
                    for first, second in PAIRS:
                        kernel = PRODUCTS[second](PRODUCTS[first](tokens))
                        picks = greedy_from_kernel(kernel[None], ridge.float(), k)[0]
                        ratios[f"{first}, {second}"].append(logdet(gram, gamma, picks) / exact)
                    line = "  ".join(f"{pair}: {values[-1]:.6f}" for pair, values in ratios.items())
                    print(f"{num_tokens} x {width}, {k}, seed {seed}, {kind}, {scale}  {line}", flush=True)
    print(json.dumps({pair: summary(values) for pair, values in ratios.items()}))


def summary(ratios: list[float]) -> dict[str, float]:
    below, changed = sum(ratio < 0.9999 for ratio in ratios), sum(abs(ratio - 1) > 1e-9 for ratio in ratios)
    return {"worst": round(min(ratios), 6), "below 0.9999": below, "changed": changed, "of": len(ratios)}


if __name__ == "__main__":
    main()
