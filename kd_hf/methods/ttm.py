"""Transformed teacher matching: the student, at temperature 1, matches a power of the teacher's distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import divergence, frozen, full_precision
from kd_hf.outputs import Outputs, Target


class TTM(Method):
    """``match = 1/B Σ_b KL(q^γ_b / U_b ‖ p_b)`` with U_b = Σ_k q_bk^γ; p and q at temperature 1.

    The power transform is a temperature 1/γ for the teacher alone: ``q^γ / U = softmax(γ z_t)``, which is how it is
    computed, as a power of q would underflow. There is no factor T².

    The paper's weight and γ vary by pair; the defaults are the one published setting, CIFAR-100's VGG-13 → VGG-8.
    """

    name = "ttm"
    weight = 45.0
    paper = Reference(
        "Knowledge Distillation Based on Transformed Teacher Matching",
        "https://arxiv.org/abs/2402.11148",
        "https://github.com/zkxufo/TTM",
    )

    class Config(MethodConfig):
        """Options of TTM."""

        gamma: float = Field(0.1, gt=0)
        """γ: the exponent of the teacher's probabilities, 1 over its temperature."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"match": scalar}``."""
        assert teacher is not None
        log_p = full_precision(student.logits).log_softmax(1)
        return {"match": divergence(log_p, (self.cfg.gamma * frozen(teacher.logits)).log_softmax(1))}
