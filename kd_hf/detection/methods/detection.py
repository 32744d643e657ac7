"""The ordinary loss of a detector on labelled objects, as a method: its architecture's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kd_hf.detection.data.stage import BoxTarget
from kd_hf.detection.networks.info import BoxOutputs, DetectorInfo
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, Needs, Reference
from kd_hf.outputs import Outputs, Target


class DetectionLoss(Method):
    """The architecture's own loss on labelled objects: classes, boxes, every stage.

    Its parts are those of :class:`~kd_hf.detection.networks.criterion.Judge`.

    Options are those of the network's configuration (`class_cost`, `bbox_loss_coefficient`, `auxiliary_loss`, …), which
    a recipe sets in ``student.kwargs``.
    """

    name = "detection"
    paper = Reference("End-to-End Object Detection with Transformers", "https://arxiv.org/abs/2005.12872")

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Labelled objects; nothing of the teacher."""
        if not isinstance(student, DetectorInfo):
            raise UserError(f"methods.{cls.name}: '{student.name}' is no detector")
        if student.masks:
            raise UserError(
                f"methods.{cls.name}: '{student.name}' learns from masks, and there are boxes only; set "
                "student.kwargs: {token_label: false, mask_vector: 0}"
            )
        return Needs(labels="hard", batch_coupled=True)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target | BoxTarget, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what the network's :class:`~kd_hf.detection.networks.criterion.Judge` says."""
        assert isinstance(student, BoxOutputs) and isinstance(target, BoxTarget) and student.criterion is not None
        return student.criterion(target)
