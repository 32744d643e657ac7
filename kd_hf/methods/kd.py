"""Knowledge distillation: the student's softened distribution against the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import cross_entropy, logit_pair, tempered
from kd_hf.outputs import Outputs, Target


class KD(Method):
    """``soft = -T²/B Σ_b Σ_k q_bk log p_bk``, p and q the softmax of student and teacher logits over T.

    A cross-entropy, not a divergence: the gradient is the same, the value differs by T² times the teacher's
    entropy. The paper's loss is ``(1 - α) task + α kd`` with α = 0.5; both factors are weights of the recipe.
    ``temperature`` is 1 for CNNs on ImageNet, 3 on CIFAR-100 and 4 in the first paper's setting. With ``logit_std`` p
    and q are of z-scores; its paper takes T = 2 and a weight of 9 beside 0.1 of the task loss.
    """

    name = "kd"
    weight = 0.5
    paper = Reference("Distilling the Knowledge in a Neural Network", "https://arxiv.org/abs/1503.02531")

    class Config(MethodConfig):
        """Options of KD."""

        temperature: float = Field(1.0, gt=0)
        """T: divides the logits of both networks."""
        logit_std: bool = False
        """Standardise the logits of both networks over the classes first."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"soft": scalar}``."""
        assert teacher is not None
        temperature = self.cfg.temperature
        logits, reference = logit_pair(student.logits, teacher.logits, self.cfg.logit_std)
        log_p = tempered(logits, temperature).log_softmax(1)
        rows = tempered(reference, temperature).softmax(1)
        return {"soft": cross_entropy(log_p, rows, temperature**2)}
