"""ViDT's loss: every prediction is matched with the objects anew, then compared pair by pair.

This file is copied into every artefact of the network and runs there without this package: it needs torch,
torchvision, transformers and scipy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.loss.loss_for_object_detection import box_iou, dice_loss, sigmoid_focal_loss

from .mask_vectors import encode_masks
from .vidt_config import ViDTConfig

WEIGHTS: Mapping[str, float] = {
    "loss_ce": 2.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_iouaware": 2.0,
    "loss_token_focal": 2.0,
    "loss_token_dice": 2.0,
    "loss_vector": 3.0,
}
Predictions = Mapping[str, Any]
Targets = Sequence[Mapping[str, Tensor]]
Pairs = Sequence[tuple[Tensor, Tensor]]


class Matcher(DeformableDetrHungarianMatcher):
    """The cheapest assignment of objects to queries: focal cost of the class, L1 and GIoU of the boxes."""

    def forward(self, outputs: Predictions, targets: Targets) -> list[tuple[Tensor, Tensor]]:
        """For each image the indices of matched queries and of their objects; a batch may have no object at all."""
        if not any(len(target["boxes"]) for target in targets):
            none = torch.zeros(0, dtype=torch.int64)
            return [(none, none)] * len(targets)
        pairs: list[tuple[Tensor, Tensor]] = super().forward(outputs, targets)
        return pairs


class Criterion(DeformableDetrImageLoss):
    """Parts of the loss by name; a part of prediction i before the last ends in ``_i``.

    With n the number of objects in the batch, averaged over processes and at least 1, and p, t matched pairs:

    - ``loss_ce``: focal loss (γ = 2) of all logits over n;
    - ``loss_bbox`` and ``loss_giou``: Σ |p - t| / n and Σ (1 - GIoU(p, t)) / n;
    - ``loss_iouaware``: Σ BCE(predicted overlap, IoU(p, t)) / n, whose gradient reaches the boxes as well;
    - ``loss_vector``: mean |predicted - true coefficient| of the masks;
    - ``loss_token_focal``, ``loss_token_dice``: of the memory's tokens against the masks' classes, not per prediction.

    ``class_error`` (percent of the pairs whose most likely class is wrong) and ``cardinality_error`` are for the log.
    """

    def __init__(self, config: ViDTConfig) -> None:
        parts = ["labels", "boxes", "cardinality", "error", "overlaps", "vectors", "tokens"]
        matcher = Matcher(config.class_cost, config.bbox_cost, config.giou_cost)
        super().__init__(matcher, config.num_labels, config.focal_alpha, parts)
        self.mask_size = config.mask_size
        self.weights = {**WEIGHTS, **config.loss_weights}
        # a part whose prediction is not there is left out
        self.own: Mapping[str, tuple[str, Callable[..., dict[str, Tensor]]]] = {
            "error": ("auxiliary_outputs", self.class_error),
            "overlaps": ("pred_ious", self.loss_overlaps),
            "vectors": ("pred_vectors", self.loss_vectors),
            "tokens": ("token_logits", self.loss_tokens),
        }

    def get_loss(
        self, loss: str, outputs: Predictions, targets: Targets, indices: Pairs, num_boxes: float
    ) -> dict[str, Tensor]:
        """One kind of loss of one prediction."""
        if loss not in self.own:
            parts: dict[str, Tensor] = super().get_loss(loss, outputs, targets, indices, num_boxes)
            return parts
        needed, function = self.own[loss]
        return function(outputs, targets, indices, num_boxes) if needed in outputs else {}

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        weighted = []
        for name, value in parts.items():
            kind, _, number = name.rpartition("_")
            kind = kind if number.isdecimal() else name
            if kind in self.weights:
                weighted.append(self.weights[kind] * value)
        return torch.stack(weighted).sum()

    @torch.no_grad()
    def class_error(
        self, outputs: Predictions, targets: Targets, indices: Pairs, num_boxes: float
    ) -> dict[str, Tensor]:
        """Percent of the last prediction's pairs with another class on top; 100 when there is no pair."""
        logits = outputs["logits"][self._get_source_permutation_idx(indices)]
        wrong = logits.argmax(-1) != _matched(targets, indices, "class_labels")
        return {"class_error": 100 * wrong.to(logits.dtype).mean().nan_to_num(1.0)}

    def loss_overlaps(
        self, outputs: Predictions, targets: Targets, indices: Pairs, num_boxes: float
    ) -> dict[str, Tensor]:
        """Of the predicted overlap."""
        chosen = self._get_source_permutation_idx(indices)
        boxes, truth = _corners(outputs["pred_boxes"][chosen]), _corners(_matched(targets, indices, "boxes"))
        overlap = torch.diag(box_iou(boxes, truth)[0])
        logits = outputs["pred_ious"][chosen].squeeze(-1)
        return {"loss_iouaware": F.binary_cross_entropy_with_logits(logits, overlap, reduction="sum") / num_boxes}

    def loss_vectors(
        self, outputs: Predictions, targets: Targets, indices: Pairs, num_boxes: float
    ) -> dict[str, Tensor]:
        """Of the masks' vectors."""
        vectors = outputs["pred_vectors"][self._get_source_permutation_idx(indices)]
        if not len(vectors):
            return {"loss_vector": vectors.sum()}
        truth = []
        for target, (_, objects) in zip(targets, indices, strict=True):
            masks = target["masks"][objects]
            height, width = masks.shape[-2:]
            boxes = _corners(target["boxes"][objects])
            corners = boxes * boxes.new_tensor([width, height, width, height])
            truth.append(encode_masks(masks, corners, self.mask_size, vectors.shape[-1]))
        return {"loss_vector": F.l1_loss(vectors, torch.cat(truth))}

    def loss_tokens(
        self, outputs: Predictions, targets: Targets, indices: Pairs, num_boxes: float
    ) -> dict[str, Tensor]:
        """Of the memory's tokens: one target per class, and class 0 stands for any object."""
        logits = outputs["token_logits"]
        classes = token_targets(targets, self.num_classes).to(logits[0].dtype)
        focal, dice = [], []
        for level in logits:
            soft = F.adaptive_avg_pool2d(classes, level.shape[1:3]).permute(0, 2, 3, 1).flatten(1, 2)
            focal.append(sigmoid_focal_loss(level.flatten(1, 2), soft, num_boxes))
            dice.append(dice_loss(level.flatten(1, 2), soft.flatten(1), num_boxes))
        return {"loss_token_focal": torch.stack(focal).sum(), "loss_token_dice": torch.stack(dice).sum()}


def _corners(boxes: Tensor) -> Tensor:
    corners: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return corners


def _matched(targets: Targets, indices: Pairs, key: str) -> Tensor:
    """An entry of all matched objects, one after the other."""
    return torch.cat([target[key][objects] for target, (_, objects) in zip(targets, indices, strict=True)])


def token_targets(targets: Targets, num_classes: int) -> Tensor:
    """Each pixel's class as ``[B, K, H, W]``: 1 for its object's class, or 0 everywhere; index 0 says any object.

    The first of several objects at a pixel counts. Masks are filled up to the largest of the batch.
    """
    height, width = (max(target["masks"].shape[axis] for target in targets) for axis in (-2, -1))
    numbers = targets[0]["masks"].new_zeros(len(targets), height, width, dtype=torch.int64)
    for number, target in zip(numbers, targets, strict=True):
        rows, columns = target["masks"].shape[-2:]
        for mask, label in zip(target["masks"].flip(0).bool(), target["class_labels"].flip(0), strict=True):
            number[:rows, :columns][mask] = label
    classes = F.one_hot(numbers, num_classes).movedim(-1, 1)
    classes[:, 0] = 1 - classes[:, 0]
    return classes


def detection_loss(config: ViDTConfig, outputs: Predictions, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch.

    Args:
        config: the network's.
        outputs: ``logits`` ``[B, Q, K]``, ``pred_boxes`` ``[B, Q, 4]`` and ``auxiliary_outputs``, a list of the same;
            optionally ``pred_ious`` ``[B, Q, 1]``, ``pred_vectors`` ``[B, Q, V]`` in each, and ``token_logits``.
        targets: for each image ``class_labels`` ``[n]``, ``boxes`` ``[n, 4]`` as centre, width and height relative to
            the image without padding, and ``masks`` ``[n, H, W]`` of that image where mask parts are learned.

    Returns:
        The weighted sum and all parts. All is computed in the predictions' full precision.
    """
    criterion = Criterion(config)
    outputs = _full(outputs)
    boxes = outputs["pred_boxes"]
    targets = [{name: value.to(boxes.device) for name, value in target.items()} for target in targets]
    targets = [{**target, "boxes": target["boxes"].to(boxes.dtype)} for target in targets]
    with torch.autocast(boxes.device.type, enabled=False):
        parts = criterion(outputs, targets)
        return criterion.total(parts), parts


def _full(values: Any) -> Any:
    """Tensors anywhere in a structure in float32, or as they are when float64."""
    if isinstance(values, Mapping):
        return {name: _full(value) for name, value in values.items()}
    if isinstance(values, Tensor):
        return values if values.dtype == torch.float64 else values.float()
    return [_full(value) for value in values]
