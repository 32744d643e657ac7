"""Numbers that follow from a name, so that files need not store them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, shape: Sequence[int]) -> Tensor:
    """Numbers in [-1, 1) in float64: SplitMix64 of the name's CRC-32 and the flat index."""
    with np.errstate(over="ignore"):
        x = np.uint64(zlib.crc32(name.encode()) << 32) + np.arange(math.prod(shape), dtype=np.uint64)
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(2 * ((z >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1).reshape(tuple(shape))
