"""From logits and boxes to detections: the rules of the two kinds of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kd_hf.detection.data.categories import is_matched, outputs_of_classes

DETECTIONS = 100  # of an image; COCO's AP looks at no more of a class


@dataclass(frozen=True, eq=False)
class Detections:
    """What a network finds in the images of a batch."""

    scores: Tensor
    """float32 ``[B, N]``, from 0 to 1."""
    classes: Tensor
    """int64 ``[B, N]``; -1 where an output stands for no class of the data."""
    boxes: Tensor
    """float32 ``[B, N, 4]``: left, top, right, bottom in pixels of the stored image."""


Rule = Callable[[Tensor, Tensor, Tensor], Detections]
"""Logits ``[B, Q, K]``, boxes ``[B, Q, 4]`` (centre, width and height, relative to the image), and (height, width) of
the stored images ``[B, 2]`` → detections, whose classes are outputs."""


def highest_scores(logits: Tensor, boxes: Tensor, size: Tensor) -> Detections:
    """The rule of Deformable DETR and ViDT: a sigmoid for each class, the 100 highest of all Q · K scores.

    A query may be found under several classes; no suppression, no threshold.
    """
    scores, index = logits.float().sigmoid().flatten(1).topk(min(DETECTIONS, logits.shape[1] * logits.shape[2]), 1)
    query, label = index // logits.shape[2], index % logits.shape[2]
    corners = in_pixels(boxes, size).gather(1, query[:, :, None].expand(-1, -1, 4))
    return Detections(scores, label, corners)


def best_classes(logits: Tensor, boxes: Tensor, size: Tensor) -> Detections:
    """The rule of DETR and YOLOS: a softmax of which the last output is "no object"; the best other one of a query."""
    scores, label = logits.float().softmax(-1)[..., :-1].max(-1)
    return Detections(scores, label, in_pixels(boxes, size))


def in_pixels(boxes: Tensor, size: Tensor) -> Tensor:
    """Corners in pixels of images of (height, width) ``[B, 2]``, of relative boxes ``[B, Q, 4]``."""
    centre, sides = boxes.float().split(2, -1)
    corners = torch.cat([centre - sides / 2, centre + sides / 2], -1)
    return corners * size.flip(1).repeat(1, 2)[:, None].float()


class Head:
    """How a network's outputs are read as classes of the data.

    A network has an output for each class of the data and a sigmoid for each, or one more, "no object", and a softmax;
    for COCO's classes see :func:`kd_hf.detection.data.categories.outputs_of_classes`.

    Args:
        names: of the data's classes, by number.
        outputs: the last axis of the logits.

    Raises:
        UserError: a number of outputs that fits neither.
    """

    def __init__(self, names: Sequence[str], outputs: int) -> None:
        self.rule, found = _read(names, outputs)
        classes = np.full(outputs, -1, np.int64)
        known = found >= 0
        classes[found[known]] = np.flatnonzero(known)
        self.classes = torch.from_numpy(classes)  # of each output

    def __call__(self, logits: Tensor, boxes: Tensor, size: Tensor) -> Detections:
        """Detections by classes of the data; see :data:`Rule`."""
        found = self.rule(logits, boxes, size)
        if self.classes.device != logits.device:
            self.classes = self.classes.to(logits.device)
        return replace(found, classes=self.classes[found.classes])


def _read(names: Sequence[str], outputs: int) -> tuple[Rule, np.ndarray]:
    """The rule, and the output that stands for each class."""
    if not is_matched(names, outputs) and is_matched(names, outputs - 1):
        return best_classes, outputs_of_classes(names, outputs - 1)
    return highest_scores, outputs_of_classes(names, outputs)
