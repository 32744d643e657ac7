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


def hash_keys(*parts: int | str | np.ndarray) -> np.ndarray:
    """:func:`hash_key` of many samples at once: int64 ``[B]`` from parts of which some are integer arrays ``[B]``."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        whole = part.astype(np.int64).view(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & MASK64)
        state = state + np.uint64(GOLDEN) + whole
        state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_A)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX_B)
        state = state ^ (state >> np.uint64(31))
    return state.view(np.int64)


# Philox 4×64 with ten rounds (Salmon et al. 2011): multipliers and key increments
PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
PHILOX_KEYS = (GOLDEN, 0xBB67AE8584CAA73B)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def _multiplied(value: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower 64 bits of the products."""
    high, low = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    upper, lower = value >> _HALF, value & _LOW
    first, second = lower * high, upper * low
    carry = (((lower * low) >> _HALF) + (first & _LOW) + (second & _LOW)) >> _HALF
    return upper * high + (first >> _HALF) + (second >> _HALF) + carry, value * np.uint64(factor)


def first_bits(keys: np.ndarray, *parts: int | str) -> np.ndarray:
    """The first four random words of ``generator(key, *parts)`` for every key, uint64 ``[B, 4]``."""
    key = [hash_keys(keys, *parts).view(np.uint64), np.zeros(len(keys), np.uint64)]
    words = [np.full(len(keys), first, np.uint64) for first in (1, 0, 0, 0)]
    for _ in range(10):
        (high, low), (higher, lower) = (_multiplied(words[2 * i], f) for i, f in enumerate(PHILOX_MULTIPLIERS))
        words = [higher ^ words[1] ^ key[0], lower, high ^ words[3] ^ key[1], low]
        key = [word + np.uint64(step) for word, step in zip(key, PHILOX_KEYS, strict=True)]
    return np.stack(words, 1)


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
