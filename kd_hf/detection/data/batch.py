"""What the loader hands to the stage: images of several sizes in one tensor, and their objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_hf.detection.data.objects import Objects

COLUMNS = ("extent", "boxes", "classes", "size", "image_id", "row", "key", "valid")


@dataclass
class BoxBatch:
    """One rank's images of one micro step, before they are normalised on the device."""

    pixels: Tensor
    """uint8 ``[B, 3, H, W]``; images are filled up with zeros on the right and below."""
    extent: Tensor
    """int64 ``[B, 2]``: (height, width) of the images in it."""
    boxes: Tensor
    """float32 ``[N, 4]``, image after image: centre, width and height, relative to the image without padding."""
    classes: Tensor
    """int64 ``[N]``."""
    counts: tuple[int, ...]
    """Objects of each image; they sum to N."""
    size: Tensor
    """int64 ``[B, 2]``: (height, width) of the stored images."""
    image_id: Tensor
    """int64 ``[B]``."""
    row: Tensor
    """int64 ``[B]``: rows of the source (-1 for padding)."""
    key: Tensor
    """int64 ``[B]``: names the sample's random numbers."""
    valid: Tensor
    """bool ``[B]``: false for padding and, in evaluation, for unreadable images."""
    truth: tuple[Objects | None, ...] = ()
    """In evaluation, all that is annotated, crowds too; None where there is no image."""
    epoch: int = 0
    corrupt: list[int] = field(default_factory=list)
    """Rows that could not be read: replaced in training, not valid in evaluation."""
    removed: int = 0
    """Boxes of these images that were none: not finite, or without an area."""

    def __len__(self) -> int:
        return len(self.counts)

    def __getstate__(self) -> dict[str, Any]:
        # a tensor that travels between processes takes a file descriptor and a message of its own
        return {**vars(self), **{name: getattr(self, name).numpy() for name in COLUMNS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **{name: torch.from_numpy(state[name]) for name in COLUMNS})

    @property
    def mask(self) -> Tensor:
        """bool ``[B, H, W]``: true where there is padding."""
        height, width = self.pixels.shape[-2:]
        device = self.pixels.device
        rows = torch.arange(height, device=device) >= self.extent[:, :1]  # [B, H]
        columns = torch.arange(width, device=device) >= self.extent[:, 1:]  # [B, W]
        return rows[:, :, None] | columns[:, None, :]

    def _map(self, function: Callable[[Tensor], Tensor]) -> BoxBatch:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in ("pixels", *COLUMNS)}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BoxBatch:
        """The batch with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> BoxBatch:
        """The batch in page-locked memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    @classmethod
    def join(cls, parts: Sequence[BoxBatch], pin: bool = False) -> BoxBatch:
        """One batch of consecutive parts, in page-locked memory if `pin`."""
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        whole = dataclasses.replace(
            parts[0],
            pixels=filled_up([part.pixels for part in parts]),
            counts=tuple(count for part in parts for count in part.counts),
            truth=tuple(objects for part in parts for objects in part.truth),
            corrupt=[row for part in parts for row in part.corrupt],
            removed=sum(part.removed for part in parts),
            **joined,
        )
        return whole.pin_memory() if pin else whole


def filled_up(images: Sequence[Tensor]) -> Tensor:
    """uint8 ``[b, 3, h, w]`` of several sizes as one ``[B, 3, H, W]``, with zeros on the right and below."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    whole = torch.zeros(sum(map(len, images)), 3, height, width, dtype=torch.uint8)
    start = 0
    for image in images:
        whole[start : start + len(image), :, : image.shape[-2], : image.shape[-1]] = image
        start += len(image)
    return whole
