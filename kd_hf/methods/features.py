"""How a tapped feature of any kind becomes what a method compares. The role a tap is declared under says which kind.

Shapes alone do not tell how many prefix tokens a sequence starts with, so a role carries that number.
"""

from __future__ import annotations

import math

from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo

_SEPARATOR = "_after_"


def patch_role(name: str, tap: str, info: ModelInfo) -> str:
    """The role for a tap whose patches are wanted: `name`, marked with the number of tokens before the patches."""
    kind, _, argument = tap.partition(":")
    prefix = {"block": len(info.block_prefix), "tokens": 0 if argument else len(info.prefix)}
    count = prefix.get(kind, 0)
    return f"{name}{_SEPARATOR}{count}" if count else name


def prefix_length(role: str) -> int:
    """Tokens before the patches, as :func:`patch_role` marked the role."""
    return int(role.partition(_SEPARATOR)[2] or 0)


def pooled(role: str, value: Tensor) -> Tensor:
    """Mean over positions: a map ``[B, C, H, W]``, tokens ``[B, N, C]`` or a vector ``[B, C]`` as ``[B, C]``."""
    if value.ndim == 4:
        return value.mean((2, 3))
    return value[:, prefix_length(role) :].mean(1) if value.ndim == 3 else value


def width(shape: tuple[int, ...]) -> int:
    """Channels of a tap from its shape without the batch."""
    return shape[0] if len(shape) == 3 else shape[-1]


def map_shape(place: str, role: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width) of a tapped map or token sequence.

    Args:
        place: recipe key that a refusal names.
        role: as :func:`patch_role` gave it.
        shape: of the tap, without the batch.

    Raises:
        UserError: for anything else than a map, or than a sequence whose patches form a square.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    count = shape[0] - prefix_length(role)
    side = math.isqrt(max(count, 0))
    if len(shape) != 2 or side * side != count or not count:
        raise UserError(
            f"{place} gives shape {shape}; expected a map (channels, height, width) or a square of patch tokens"
        )
    return shape[1], side, side


def as_map(role: str, value: Tensor) -> Tensor:
    """A map ``[B, C, H, W]``, or tokens whose patches form a square, as ``[B, C, H, W]``."""
    if value.ndim == 4:
        return value
    patches = value[:, prefix_length(role) :]
    return patches.transpose(1, 2).unflatten(2, (math.isqrt(patches.shape[1]), -1))


def as_tokens(role: str, value: Tensor) -> Tensor:
    """A map or tokens as patch tokens ``[B, N, C]`` in raster order."""
    return value.flatten(2).transpose(1, 2) if value.ndim == 4 else value[:, prefix_length(role) :]
