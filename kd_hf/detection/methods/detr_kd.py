"""Distillation of what a detector predicts: classes and boxes of a teacher's queries to a student's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_hf.detection.methods.matching import (
    MatchConfig,
    pair_queries,
    paired_giou,
    probabilities,
    require_detectors,
    require_index,
    take,
)
from kd_hf.detection.networks.info import BoxOutputs
from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, Needs, Reference
from kd_hf.methods.losses import exact, frozen, full_precision
from kd_hf.outputs import Outputs, Target


class DetrKd(Method):
    """Every query of the student learns the prediction of the teacher's query it is paired with.

    With pairs q of an image, the teacher's confidence ``c_q`` (its highest class probability) and ``w = c / Σ_q c``::

        class = class_weight · Σ_q w_q T² KL(t_q ‖ s_q)       bbox = bbox_weight · Σ_q w_q |a_q - b_q|₁
        giou  = giou_weight  · Σ_q w_q (1 - GIoU(a_q, b_q))

    averaged over images. Where a class has a sigmoid of its own, KL is the sum over the classes' two outcomes. Matching
    the teacher's predictions as if they were objects is DETRDistill's; weights by confidence are KD-DETR's
    (https://arxiv.org/abs/2211.08071). Neither is reproduced in full.
    """

    name = "detr_kd"
    paper = Reference(
        "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families",
        "https://arxiv.org/abs/2211.10156",
    )

    class Config(MatchConfig):
        """Options of distilling predictions."""

        temperature: float = Field(1.0, gt=0)
        class_weight: float = Field(1.0, ge=0)
        bbox_weight: float = Field(5.0, ge=0)
        giou_weight: float = Field(2.0, ge=0)
        stages: Literal["last", "all"] = "last"
        """Which of the student's stages learn; `all` need a student whose stages predict (`auxiliary_loss`), and each
        is paired with the teacher's last one anew."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The predictions of both."""
        require_index(cfg, cls.name, *require_detectors(cls.name, student, teacher, same_classes=True))
        return Needs(teacher_logits=True, cacheable=False)  # a store has no boxes

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"class": scalar, "bbox": scalar, "giou": scalar}``; stages are summed."""
        assert isinstance(student, BoxOutputs) and isinstance(teacher, BoxOutputs)
        earlier = student.auxiliary if self.cfg.stages == "all" else ()
        losses: dict[str, Tensor] = {}
        with exact(student.logits):
            for logits, boxes in (*earlier, (student.logits, student.boxes)):
                stage = replace(student, logits=logits, boxes=boxes)
                for name, value in self._stage(stage, teacher).items():
                    losses[name] = losses.get(name, 0) + value
        return losses

    def _stage(self, student: BoxOutputs, teacher: BoxOutputs) -> dict[str, Tensor]:
        rows, columns = pair_queries(self.cfg, student, teacher)
        logits, boxes = take(full_precision(student.logits), rows), take(full_precision(student.boxes), rows)
        taught, places = take(frozen(teacher.logits), columns), take(frozen(teacher.boxes), columns)
        confidence = probabilities(taught, teacher.softmax).amax(-1)  # [B, M]
        weights = confidence / confidence.sum(1, keepdim=True).clamp(min=1e-12)
        cfg = self.cfg
        parts = {
            "class": cfg.class_weight * self._divergence(logits, taught, student.softmax),
            "bbox": cfg.bbox_weight * (boxes - places).abs().sum(-1),
            "giou": cfg.giou_weight * (1 - paired_giou(boxes, places)),
        }
        return {name: (weights * part).sum(1).mean() for name, part in parts.items()}

    def _divergence(self, logits: Tensor, taught: Tensor, softmax: bool) -> Tensor:
        """KL of pairs, ``[B, M, K] → [B, M]``."""
        temperature = self.cfg.temperature
        logits, taught = logits / temperature, taught / temperature
        if softmax:
            kinds = [(logits.log_softmax(-1), taught.log_softmax(-1))]
        else:
            kinds = [(F.logsigmoid(sign * logits), F.logsigmoid(sign * taught)) for sign in (1, -1)]
        parts = [(told.exp() * (told - said)).sum(-1) for said, told in kinds]
        return temperature**2 * torch.stack(parts).sum(0)
