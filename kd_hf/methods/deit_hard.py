"""Hard distillation through the distillation token (or the only head)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, Needs, Reference, require_teacher
from kd_hf.methods.losses import frozen, full_precision
from kd_hf.outputs import Outputs, Target


class DeiTHard(Method):
    """``hard = -1/B Σ_b log p_b,t`` with ``t = argmax`` of the teacher's logits, p = softmax, no smoothing.

    The student's logits are those of the distillation head where it has one, else of its only head. Under mixing
    the teacher judges the mixed image. The paper's loss is ``0.5 task + 0.5 deit_hard``; both factors are weights
    of the recipe.
    """

    name = "deit_hard"
    weight = 0.5
    paper = Reference(
        "Training data-efficient image transformers & distillation through attention",
        "https://arxiv.org/abs/2012.12877",
        "https://github.com/facebookresearch/deit",
    )

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits, and the student's second head where it has one."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, dist_head=student.dist_head is not None)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"hard": scalar}``."""
        assert teacher is not None
        logits = student.logits if student.dist_logits is None else student.dist_logits
        return {"hard": F.cross_entropy(full_precision(logits), frozen(teacher.logits).argmax(1))}
