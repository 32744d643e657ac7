"""Similarity-preserving distillation: images that are alike to the teacher must be alike to the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import exact, frozen, full_precision
from kd_hf.methods.ranks import gathered
from kd_hf.outputs import Outputs, Target


class SP(Method):
    """``similarity = 1/B² Σ_ij (G^t_ij - G^s_ij)²`` with ``G = F Fᵀ`` and every row of G of length 1.

    F ``[B, …]`` are the flattened last maps before pooling; widths and sizes need not agree. The loss compares the
    images of a batch with each other, so its size matters, and of one image there is nothing to learn.
    """

    name = "sp"
    weight = 3000.0
    least_images = 2
    paper = Reference(
        "Similarity-Preserving Knowledge Distillation",
        "https://arxiv.org/abs/1907.09682",
        "https://github.com/HobbitLong/RepDistiller",
    )

    class Config(MethodConfig):
        """Options of SP."""

        student_tap: str = "stage:-1"
        """What is compared of the student, of any shape."""
        teacher_tap: str = "stage:-1"
        """What is compared of the teacher, of any shape."""
        gather: bool = False
        """Take the images of all processes as one batch."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One feature of each network."""
        require_teacher(cls.name, teacher, student, same_classes=False)
        return Needs(
            student={"feature": cfg.student_tap},
            teacher={"feature": cfg.teacher_tap},
            batch_coupled=True,
            gathered=cfg.gather,
        )

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"similarity": scalar}``."""
        assert teacher is not None
        features = full_precision(student.taps["feature"]), frozen(teacher.taps["feature"])
        if self.cfg.gather:
            features = gathered(features[0]), gathered(features[1])
        ours, theirs = (similarities(feature) for feature in features)
        return {"similarity": F.mse_loss(ours, theirs)}


def similarities(features: Tensor) -> Tensor:
    """Products of the features ``[B, …]`` of each image with those of all, every row of length 1: ``[B, B]``."""
    rows = features.flatten(1)
    with exact(rows):
        return F.normalize(rows @ rows.T)
