"""The objects of one image as they are stored, and what training keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects of an image, in pixels of the image as it is stored."""

    boxes: np.ndarray
    """float64 ``[n, 4]``: left, top, right, bottom."""
    classes: np.ndarray
    """int64 ``[n]``."""
    area: np.ndarray
    """float64 ``[n]``: of the object itself where it is known, else of its box."""
    iscrowd: np.ndarray
    """bool ``[n]``: the box holds many objects that were not counted."""
    image_id: int
    size: Size | None = None
    """Of the image, where the annotations say it."""

    def __len__(self) -> int:
        return len(self.classes)

    def only(self, chosen: np.ndarray | slice) -> Objects:
        """Those of a mask, bool ``[n]``, or of a range."""
        parts = {name: getattr(self, name)[chosen] for name in ("boxes", "classes", "area", "iscrowd")}
        return replace(self, **parts)


def make_objects(
    boxes: Any,
    classes: Sequence[int],
    area: Sequence[float] | None = None,
    iscrowd: Sequence[int] | None = None,
    image_id: int = 0,
    size: Size | None = None,
    box_format: str = "xywh",
) -> Objects:
    """Objects from plain lists, which may be empty; `boxes` are ``[n, 4]`` in the format that is named."""
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    if box_format == "xywh":
        corners[:, 2:] += corners[:, :2]
    count = len(corners)
    sides = corners[:, 2:] - corners[:, :2]
    return Objects(
        corners,
        np.asarray(classes, np.int64).reshape(count),
        sides.prod(1) if area is None else np.asarray(area, np.float64).reshape(count),
        np.zeros(count, bool) if iscrowd is None else np.asarray(iscrowd).astype(bool).reshape(count),
        image_id,
        size,
    )


def clipped(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Boxes ``[n, 4]`` cut off at the borders of an image."""
    return np.clip(boxes, 0.0, np.asarray(size * 2, np.float64))


def visible(boxes: np.ndarray) -> np.ndarray:
    """Which of the boxes ``[n, 4]`` have an area, bool ``[n]``; false for NaN."""
    found: np.ndarray = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    return found


def trainable(objects: Objects, size: Size) -> tuple[Objects, int]:
    """What training learns from: no crowds, boxes cut off at the borders of the image.

    Returns:
        the objects, and how many were removed because their box is no box (not finite, or without an area).
    """
    single = objects.only(~objects.iscrowd)
    finite = np.isfinite(single.boxes).all(1)
    single = replace(single, boxes=clipped(single.boxes, size))
    kept = single.only(visible(single.boxes) & finite)
    return kept, len(single) - len(kept)
