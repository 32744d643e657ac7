"""Learnable pieces that bring a student's features to a teacher's, shared by several methods."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from kd_hf.methods.losses import full_precision


class Generator(nn.Sequential):
    """3×3 convolution, ReLU, 3×3 convolution, all of one width: ``[B, C, H, W] → [B, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )


class Connector(nn.Sequential):
    """1×1 convolution without bias, batch normalisation and ReLU: ``[B, C_s, H, W] → [B, C_t, H, W]``.

    The kernel starts as ``N(0, 2 / C_t)``; the ReLU may be left out.
    """

    def __init__(self, width: int, channels: int, relu: bool = True) -> None:
        convolution = nn.Conv2d(width, channels, 1, bias=False)
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / channels))
        super().__init__(convolution, nn.BatchNorm2d(channels), *([nn.ReLU(inplace=True)] if relu else []))


class TokenProjector(nn.Module):
    """Linear to the mean of both widths, GELU, Linear: ``[…, D_s] → […, D_t]`` in the weights' precision.

    Weights start as a truncated normal of deviation 0.02, biases as 0.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        hidden = (width + channels) // 2
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens; the result is in full precision."""
        return full_precision(self.fc2(self.act(self.fc1(tokens.to(self.fc1.weight.dtype)))))


def align_tokens(width: int, channels: int) -> nn.Module:
    """A Linear between the widths of tokens ``[…, D_s] → […, D_t]``; nothing where they are equal."""
    return nn.Linear(width, channels) if width != channels else nn.Identity()


def kernel_macs(modules: Iterable[nn.Module]) -> int:
    """Multiply–accumulates at one position of the convolutions and Linear layers among `modules`."""
    return sum(module.weight.numel() for module in modules if isinstance(module, (nn.Conv2d, nn.Linear)))
