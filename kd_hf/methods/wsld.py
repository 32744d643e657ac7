"""Weighted soft labels: distil less where the student already does as well as the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import cross_entropy, frozen, full_precision, labelled, tempered
from kd_hf.outputs import Outputs, Target

# keeps the quotient finite for a teacher that is certain; part of the published formula
TEACHER_LOSS_FLOOR = 1e-7


class WSLD(Method):
    """``soft = T²/B Σ_b w_b (-Σ_k q_bk log p_bk)`` with ``w_b = 1 - exp(-c^s_b / c^t_b)``.

    c^s and c^t are the cross-entropies of student and teacher on the label at temperature 1, without gradient;
    p and q the softmax at temperature T. Index labels only; samples without a label add 0.

    Defaults are those of ImageNet (T = 2, weight 2.5); CIFAR-100 uses T = 4 and weight 2.25.
    """

    name = "wsld"
    weight = 2.5
    paper = Reference(
        "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective",
        "https://arxiv.org/abs/2102.00650",
        "https://github.com/bellymonster/Weighted-Soft-Label-Distillation",
    )

    class Config(MethodConfig):
        """Options of WSLD."""

        temperature: float = Field(2.0, gt=0)
        """T: divides the logits of both networks in the soft loss, not in the weights."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits and index labels."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, labels="hard")

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"soft": scalar}``."""
        assert teacher is not None
        label, known = labelled(target.hard)
        logits, reference = full_precision(student.logits), frozen(teacher.logits)
        ours = F.cross_entropy(logits.detach(), label, reduction="none")
        theirs = F.cross_entropy(reference, label, reduction="none")
        weights = -torch.expm1(-(ours / (theirs + TEACHER_LOSS_FLOOR)).clamp(min=0))
        temperature = self.cfg.temperature
        log_p = tempered(logits, temperature).log_softmax(1)
        rows = tempered(reference, temperature).softmax(1) * weights[:, None]
        return {"soft": cross_entropy(log_p, rows, temperature**2, known)}
