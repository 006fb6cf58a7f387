"""What loops over new tokens share: how seldom they look at their device, and how they fail on logits without a value.

A look at a GPU waits for all it has been given. So no loop asks at each step whether the logits are finite: it writes
BROKEN into the answer, which the host reads at the end anyway.

Shape suffixes: B prompts, V vocabulary.
"""

import torch
from torch import Tensor

CHECK_EVERY = 8  # steps between looks at what is finished, on a GPU
FILL = -1  # behind the end of an answer
BROKEN = -2  # in place of a token: NaN and infinity have no likeliest one


def check_every(device: torch.device) -> int:
    """Steps between two looks at what is finished."""
    return 1 if device.type == "cpu" else CHECK_EVERY


def marked(token_B: Tensor, logits_BV: Tensor) -> Tensor:
    """`token_B` int64 with BROKEN for the rows whose logits hold NaN or +inf, or nothing but -inf."""
    return torch.where(logits_BV.amax(dim=1).isfinite(), token_B, BROKEN)


def settled(answers: list[list[int]]) -> list[list[int]]:
    """The answers without what fills them up.

    Raises:
        FloatingPointError: if one of them is broken.
    """
    if broken := sum(BROKEN in row for row in answers):
        raise FloatingPointError(f"the language model's logits are not finite in {broken} of {len(answers)} prompts")
    return [[token for token in row if token != FILL] for row in answers]
