"""Random numbers as pure functions of what they are for.

Nothing here has state. A number is named by (seed, epoch, sample, stream), so it is the same on the first
run and after a resume, on one rank or on eight, on the CPU or on a GPU (integer arithmetic only).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MASK64 = (1 << 64) - 1
# splitmix64 (Steele, Lea, Flood 2014): increment and the two finaliser multipliers
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, which is how torch holds it."""
    return value - (1 << 64) if value >> 63 else value


def _finalise(value: int) -> int:
    value = ((value ^ (value >> 30)) * MIX_A) & MASK64
    value = ((value ^ (value >> 27)) * MIX_B) & MASK64
    return value ^ (value >> 31)


def hash_key(*parts: int | str) -> int:
    """Mix integers and strings into one signed 64-bit key; the order of the parts matters."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = _finalise((state + GOLDEN + (int(part) & MASK64)) & MASK64)
    return _signed(state)


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator for host-side draws (crop boxes, Beta variates) named by `parts`."""
    return np.random.Generator(np.random.Philox(key=hash_key(*parts) & MASK64))


def seed_python(*parts: int | str) -> None:
    """Seed Python's and numpy's global generators, which timm's RandAugment draws from (about 6 µs)."""
    key = hash_key(*parts) & MASK64
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


@contextmanager
def python_state_kept() -> Iterator[None]:
    """Leave Python's and numpy's global generators as they were, whatever :func:`seed_python` does inside."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Draws:
    """Random tensors for a batch, one independent sequence per sample and stream.

    Args:
        keys: int64 ``[B]``, one per sample, from :func:`hash_key` of (seed, epoch, row, repeat).
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def uniform(self, stream: str, shape: Sequence[int]) -> torch.Tensor:
        """Uniform float32 in [0, 1) of shape ``[B, *shape]`` with 24 random bits each."""
        import torch

        count = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
        counters = torch.arange(1, count + 1, device=self.keys.device, dtype=torch.int64) * _signed(GOLDEN)
        state = self._mix(self.keys ^ hash_key(stream))[:, None] + counters[None]  # [B, count]
        bits = self._shift(self._mix(state), 40)
        return (bits.to(torch.float32) * 2.0**-24).reshape(len(self.keys), *shape)

    def normal(self, stream: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal float32 ``[B, *shape]`` (Box–Muller on two uniform streams)."""
        import torch

        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(stream + "/radius", shape)))
        return radius * torch.cos(2.0 * torch.pi * self.uniform(stream + "/angle", shape))

    @staticmethod
    def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
        """Logical right shift; torch's own keeps the sign."""
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    @classmethod
    def _mix(cls, value: torch.Tensor) -> torch.Tensor:
        value = (value ^ cls._shift(value, 30)) * _signed(MIX_A)
        value = (value ^ cls._shift(value, 27)) * _signed(MIX_B)
        return value ^ cls._shift(value, 31)
