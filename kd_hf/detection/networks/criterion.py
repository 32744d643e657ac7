"""The loss of a detector on labelled objects: each architecture's own, with its own matching and weights.

Matchers and the parts of the loss are transformers' (ViDT's are its own). Which predictions are compared, and by how
many objects a part is divided, is decided here: the number of objects is that of the whole batch, over all processes,
where transformers averages it twice or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_hf.detection.data.stage import BoxTarget
from kd_hf.detection.networks.predictions import Prediction, Predictions
from kd_hf.methods.losses import exact, full_precision

Labels = Sequence[Mapping[str, Tensor]]
Pairs = list[tuple[Tensor, Tensor]]
Made = tuple[Any, Mapping[str, float]]

# what a part of the last stage's loss is called; those of other stages are summed
PARTS = {"loss_ce": "class", "loss_vfl": "class", "loss_bbox": "bbox", "loss_giou": "giou", "loss_iouaware": "overlap"}
_LOSSES = ["labels", "boxes"]


def _detr(config: Any) -> Made:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    return ImageLoss(matcher, config.num_labels, config.eos_coefficient, _LOSSES), _box_weights(config, 1.0)


def _deformable_detr(config: Any) -> Made:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    loss = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, _LOSSES)
    return loss, _box_weights(config, 1.0)


def _lw_detr(config: Any) -> Made:
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

    matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    loss = LwDetrImageLoss(matcher, config.num_labels, config.focal_alpha, _LOSSES, config.group_detr)
    return loss, _box_weights(config, config.class_loss_coefficient)


def _box_weights(config: Any, of_class: float) -> Mapping[str, float]:
    giou = config.giou_loss_coefficient
    return {"loss_ce": of_class, "loss_bbox": config.bbox_loss_coefficient, "loss_giou": giou}


def _rt_detr(config: Any) -> Made:
    from transformers.loss.loss_rt_detr import RTDetrLoss

    loss = RTDetrLoss(config)
    return loss, loss.weight_dict


def _d_fine(config: Any) -> Made:
    from transformers.loss.loss_d_fine import DFineLoss

    loss = DFineLoss(config)
    return loss, loss.weight_dict


def _vidt(config: Any) -> Made:
    from kd_hf.detection.networks.vidt_losses import Criterion

    loss = Criterion(config)
    loss.losses = [*_LOSSES, "overlaps"]
    return loss, loss.weights


CRITERIA: Mapping[str, Callable[[Any], Made]] = {
    "detr": _detr,
    "deformable_detr": _deformable_detr,
    "lw_detr": _lw_detr,
    "rt_detr": _rt_detr,
    "d_fine": _d_fine,
    "vidt": _vidt,
}
"""From a configuration to the module that computes the parts, and the weight of each part that counts."""


def object_count(labels: Labels, device: torch.device) -> Tensor:
    """Objects of the batch of all processes over their number; of the whole batch at least 1.

    A sum over this rank's objects divided by it, averaged over the ranks, is the sum over all objects divided by their
    number, as on one rank.
    """
    count = torch.tensor(float(sum(len(label["class_labels"]) for label in labels)), device=device)
    world = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        torch.distributed.all_reduce(count)
    return count.clamp(min=1) / world


@dataclass(frozen=True)
class Judge:
    """The loss of one pass, for whatever objects it is given.

    Attributes:
        kind: a key of :data:`CRITERIA`.
        config: the network's.
        found: all it predicted.
        queries: its own; in training LW-DETR has several groups of as many.
        ratios: ``[B, 4]``, by which boxes relative to the image are brought to the network's frame.
        denoising: whether it learns from objects with noise; that loss then is there even where there is no object.
    """

    kind: str
    config: Any
    found: Predictions
    queries: int
    ratios: Tensor
    denoising: bool

    def __call__(self, target: BoxTarget) -> dict[str, Tensor]:
        """Weighted scalars whose sum is the loss.

        ``class``, ``bbox``, ``giou`` (and ``overlap``) are of the last stage, ``stage_0``, ``stage_1``, … the sums of
        those before, ``encoder`` and ``denoising`` of the other predictions where the architecture has them. All is
        computed in full precision.
        """
        boxes = self.found.last["pred_boxes"]
        with exact(boxes):
            labels = self._labels(target, full_precision(boxes).dtype)
            loss, weights = CRITERIA[self.kind](self.config)
            loss.to(boxes.device)
            scale = _Scale(loss, weights, labels, self.queries, object_count(labels, boxes.device))
            last = scale.matched(self.found.last)
            named = {PARTS[name]: value for name, value in last.items()}
            stages = {f"stage_{number}": stage for number, stage in enumerate(self.found.earlier)}
            stages |= {"encoder": self.found.encoder} if self.found.encoder else {}
            named |= {name: _total(scale.matched(stage), boxes) for name, stage in stages.items()}
            return named | self._denoising(scale, boxes)

    def _labels(self, target: BoxTarget, dtype: torch.dtype) -> Labels:
        objects = zip(target.classes, target.boxes, self.ratios, strict=True)
        return [{"class_labels": classes, "boxes": (boxes * ratio).to(dtype)} for classes, boxes, ratio in objects]

    def _denoising(self, scale: _Scale, boxes: Tensor) -> dict[str, Tensor]:
        if not self.denoising:
            return {}
        facts = self.found.denoising_facts
        total = boxes.new_zeros(())
        for stage in self.found.denoising:
            pairs = scale.loss.get_cdn_matched_indices(facts, scale.labels)
            total = total + _total(scale.parts(stage, pairs, facts["dn_num_group"]), boxes)
        return {"denoising": total}


@dataclass(frozen=True)
class _Scale:
    """An architecture's criterion with the objects of a batch."""

    loss: Any
    weights: Mapping[str, float]
    labels: Labels
    queries: int
    count: Tensor

    def matched(self, prediction: Prediction) -> dict[str, Tensor]:
        """Weighted parts of a prediction whose queries are matched with the objects."""
        groups = prediction["logits"].shape[1] // self.queries
        return self.parts(prediction, self._match(_full(prediction), groups), groups)

    def _match(self, prediction: Prediction, groups: int) -> Pairs:
        if not any(len(label["boxes"]) for label in self.labels):  # matchers cannot take a batch without objects
            none = torch.zeros(0, dtype=torch.int64)
            return [(none, none)] * len(self.labels)
        more = (groups,) if hasattr(self.loss, "group_detr") else ()
        pairs: Pairs = self.loss.matcher(prediction, self.labels, *more)
        return pairs

    def parts(self, prediction: Prediction, pairs: Pairs, groups: int) -> dict[str, Tensor]:
        """Weighted parts of a prediction whose queries are paired with the objects once for every group."""
        prediction = _full(prediction)
        found: dict[str, Tensor] = {}
        for kind in self.loss.losses:
            found |= self.loss.get_loss(kind, prediction, self.labels, pairs, self.count * groups)
        return {name: self.weights[name] * value for name, value in found.items() if name in self.weights}


def _full(prediction: Prediction) -> Prediction:
    return {name: full_precision(value) for name, value in prediction.items()}


def _total(parts: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(parts.values())).sum() if parts else like.new_zeros(())
