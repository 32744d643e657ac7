"""Soft distillation through the distillation token (or the only head)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import divergence, frozen, full_precision, tempered
from kd_hf.outputs import Outputs, Target


class DeiTSoft(Method):
    """``soft = τ²/R Σ_b KL(q_b ‖ p_b)``, q and p the softmax of teacher and student logits over τ.

    The student's logits are those of the distillation head where it has one, else of its only head. The paper
    writes a divergence per sample, R = B (``reduction: batchmean``, also in manifold distillation and [CLS]-KD);
    DeiT's own code divides by R = B·K (``reduction: numel``), which is K times weaker: 1000 times on ImageNet.
    The paper's loss is ``0.5 task + 0.5 deit_soft``; both factors are weights of the recipe.
    """

    name = "deit_soft"
    weight = 0.5
    paper = Reference(
        "Training data-efficient image transformers & distillation through attention",
        "https://arxiv.org/abs/2012.12877",
        "https://github.com/facebookresearch/deit",
    )

    class Config(MethodConfig):
        """Options of soft distillation."""

        temperature: float = Field(1.0, gt=0)
        """τ: divides the logits of both networks."""
        reduction: Literal["batchmean", "numel"] = "batchmean"
        """Divide the divergence by the images, or by images times classes as DeiT's code does."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits, and the student's second head where it has one."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, dist_head=student.dist_head is not None)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"soft": scalar}``."""
        assert teacher is not None
        temperature = self.cfg.temperature
        logits = student.logits if student.dist_logits is None else student.dist_logits
        ours = tempered(full_precision(logits), temperature).log_softmax(1)
        theirs = tempered(frozen(teacher.logits), temperature).log_softmax(1)
        classes = ours.shape[1] if self.cfg.reduction == "numel" else 1
        return {"soft": divergence(ours, theirs, temperature**2 / classes)}
