"""The pixels that a vision tower reads, of those that a picture's frame holds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x / 255 - mean) / std of each channel, in float32 and in this order, as the image processors of all families.

    Its statistics move with the module and are no weights: they come from the image processor's file, so a checkpoint
    need not hold them and `state_dict` leaves them out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, device=device), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Float32 [..., 3, H, W] on the module's device from uint8 [..., H, W, 3] anywhere."""
        pixels = pixels.to(self.mean.device, non_blocking=True)
        return ((pixels.float() / 255 - self.mean) / self.std).movedim(-1, -3)
