"""Masks as short vectors: the low frequencies of their cosine transform, in zigzag order (ViDT+, from SOLQ).

This file is copied into artefacts and runs there without this package: it needs torch and torchvision only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_matrix(size: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform of type II, ``[size, size]``; a row for each frequency."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)


def zigzag(size: int, count: int, device: torch.device) -> Tensor:
    """Flat places of the first `count` entries of a square along its diagonals, which take turns in direction."""
    places = ((row, column) for row in range(size) for column in range(size))
    ordered = sorted(places, key=lambda at: (sum(at), at[0] if sum(at) % 2 else -at[0]))
    return torch.tensor([row * size + column for row, column in ordered[:count]], device=device)


def encode_masks(masks: Tensor, boxes: Tensor, size: int, count: int) -> Tensor:
    """Vectors of masks within their boxes.

    Args:
        masks: ``[n, H, W]``, 0 or 1.
        boxes: ``[n, 4]`` corners in pixels.
        size: side of the square that a box is sampled to.
        count: length of a vector.

    Returns:
        ``[n, count]`` in the boxes' type.
    """
    from torchvision.ops import roi_align

    rows = torch.arange(len(masks), device=masks.device)
    regions = torch.cat([rows[:, None].to(boxes.dtype), boxes], 1)
    squares = roi_align(masks[:, None].to(boxes.dtype), regions, (size, size), aligned=True)[:, 0] >= 0.5
    matrix = cosine_matrix(size, boxes)
    frequencies = matrix @ squares.to(boxes.dtype) @ matrix.T
    return frequencies.flatten(1)[:, zigzag(size, count, boxes.device)]


def decode_masks(vectors: Tensor, size: int) -> Tensor:
    """The masks within their boxes: ``[…, count] → […, size, size]``, True above the middle of the range."""
    flat = vectors.new_zeros(*vectors.shape[:-1], size * size)
    flat[..., zigzag(size, vectors.shape[-1], vectors.device)] = vectors
    matrix = cosine_matrix(size, vectors)
    squares = matrix.T @ flat.unflatten(-1, (size, size)) @ matrix
    middle = (squares.amax((-2, -1), keepdim=True) + squares.amin((-2, -1), keepdim=True)) / 2
    return squares > middle
