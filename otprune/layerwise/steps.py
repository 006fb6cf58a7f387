"""Shared by all decode loops: how often they read from the device, and how they fail on logits that are not finite.

Reading a value from a GPU waits for all queued work. A decode loop therefore does not test the logits at every step. It
writes BROKEN into the answer, which the host reads at the end anyway.

Shape suffixes: B prompts, V vocabulary.
"""

import torch
from torch import Tensor

CHECK_EVERY = 8  # steps between two tests on a GPU for finished answers
FILL = -1  # fills an answer behind its end
BROKEN = -2  # in place of a token whose logits are not finite and have no likeliest token


def check_every(device: torch.device) -> int:
    """Steps between two tests of whether answers are finished: 1 on a CPU, where a test waits for nothing."""
    return 1 if device.type == "cpu" else CHECK_EVERY


def marked(token_B: Tensor, logits_BV: Tensor) -> Tensor:
    """`token_B` int64, with BROKEN in rows whose logits hold NaN or +inf, or only -inf. No wait for the device."""
    return torch.where(logits_BV.amax(dim=1).isfinite(), token_B, BROKEN)


def settled(answers: list[list[int]]) -> list[list[int]]:
    """The answers without their FILL.

    Raises:
        FloatingPointError: if an answer holds BROKEN.
    """
    if broken := sum(BROKEN in row for row in answers):
        raise FloatingPointError(f"the language model's logits are not finite in {broken} of {len(answers)} prompts")
    return [[token for token in row if token != FILL] for row in answers]
