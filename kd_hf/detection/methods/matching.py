"""Which query of a teacher a query of a student learns from."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from kd_hf.detection.networks.info import BoxOutputs, DetectorInfo
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo
from kd_hf.methods.base import MethodConfig, require_teacher
from kd_hf.methods.losses import full_precision


class MatchConfig(MethodConfig):
    """How queries of student and teacher are paired."""

    match: Literal["hungarian", "index"] = "hungarian"
    """`hungarian`: the cheapest assignment by what both predict in an image, for networks that were trained apart, or
    whose queries are picked per image. `index`: query i with query i, for a student that is trained from scratch, whose
    queries are free to follow."""
    class_cost: float = Field(2.0, ge=0)
    """Factor of Σ_k |p_k - q_k| in the cost of a pair."""
    bbox_cost: float = Field(5.0, ge=0)
    """Factor of the L1 distance of the boxes."""
    giou_cost: float = Field(2.0, ge=0)
    """Factor of 1 - GIoU of the boxes."""


def require_detectors(
    name: str, student: ModelInfo, teacher: ModelInfo | None, same_classes: bool
) -> tuple[DetectorInfo, DetectorInfo]:
    """Refuse a missing teacher, networks that are no detectors and, if asked, class heads that cannot be compared."""
    pair = student, require_teacher(name, teacher, student, same_classes)
    for info in pair:
        if not isinstance(info, DetectorInfo):
            raise UserError(f"methods.{name}: '{info.name}' is no detector")
    ours, theirs = pair
    assert isinstance(ours, DetectorInfo) and isinstance(theirs, DetectorInfo)
    if same_classes and ours.softmax != theirs.softmax:
        kinds = {True: 'a softmax with "no object"', False: "a sigmoid for each class"}
        raise UserError(
            f"methods.{name}: '{student.name}' has {kinds[ours.softmax]} and '{theirs.name}' {kinds[theirs.softmax]}; "
            "their classes cannot be compared"
        )
    return ours, theirs


def require_index(cfg: MatchConfig, name: str, student: DetectorInfo, teacher: DetectorInfo) -> None:
    """Refuse to pair queries by index where there are not as many."""
    if cfg.match == "index" and student.queries != teacher.queries:
        raise UserError(
            f"methods.{name}.match: '{student.name}' has {student.queries} queries and '{teacher.name}' "
            f"{teacher.queries}; only as many can be paired by index, others by `hungarian`"
        )


def probabilities(logits: Tensor, softmax: bool) -> Tensor:
    """Of the K classes, "no object" left out where there is such an output: ``[…, K or K + 1] → […, K]``."""
    logits = full_precision(logits)
    return logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()


@torch.no_grad()
def pair_queries(cfg: MatchConfig, student: BoxOutputs, teacher: BoxOutputs) -> tuple[Tensor, Tensor]:
    """The pairs of each image.

    A pair of predictions with class probabilities p, q and boxes a, b costs
    ``class_cost Σ_k |p_k - q_k| + bbox_cost |a - b|₁ + giou_cost (1 - GIoU(a, b))``.

    Returns:
        int64 ``[B, M]``: queries of the student, and the teacher's beside them; M is the lesser number of queries.
    """
    count = min(student.logits.shape[1], teacher.logits.shape[1])
    if cfg.match == "index":
        order = torch.arange(count, device=student.logits.device).expand(len(student.logits), -1)
        return order, order
    from scipy.optimize import linear_sum_assignment

    ours, theirs = (probabilities(seen.logits, seen.softmax) for seen in (student, teacher))
    boxes, targets = (full_precision(seen.boxes) for seen in (student, teacher))
    overlap = torch.stack(
        [generalized_box_iou(*(_corners(part) for part in pair)) for pair in zip(boxes, targets, strict=True)]
    )
    cost = cfg.class_cost * torch.cdist(ours, theirs, p=1) + cfg.bbox_cost * torch.cdist(boxes, targets, p=1)
    cost = (cost + cfg.giou_cost * (1 - overlap)).nan_to_num(nan=1e6, posinf=1e6, neginf=1e6)
    pairs = [linear_sum_assignment(costs) for costs in cost.cpu().numpy()]
    rows, columns = (torch.stack([torch.from_numpy(pair[side]) for pair in pairs]) for side in (0, 1))
    return rows.to(boxes.device), columns.to(boxes.device)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """``[B, Q, …]`` and indices ``[B, M]`` → ``[B, M, …]``."""
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]


def paired_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU of boxes (centre, width, height) with those at the same place: ``[…, 4] → […]``."""
    from torchvision.ops import generalized_box_iou_loss

    return 1 - generalized_box_iou_loss(_corners(boxes), _corners(others))


def _corners(boxes: Tensor) -> Tensor:
    corners: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return corners
