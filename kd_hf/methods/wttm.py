"""Weighted transformed teacher matching: TTM in which samples with a smooth teacher count more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import frozen, full_precision
from kd_hf.outputs import Outputs, Target


class WTTM(Method):
    """``match = 1/B Σ_b U_b KL(q^γ_b / U_b ‖ p_b)`` with U_b = Σ_k q_bk^γ; p and q at temperature 1.

    U lies between 1 (a certain teacher) and K^(1-γ) (a uniform one) for γ < 1. As in `ttm`, the distribution is
    ``softmax(γ z_t)``, without a factor T²; powers are taken of exp(z_t - max z_t), as those of q would underflow.

    The paper's weight and γ vary by pair; the defaults are the one published setting, which is for use beside `crd`.
    """

    name = "wttm"
    weight = 4.0
    paper = Reference(
        "Knowledge Distillation Based on Transformed Teacher Matching",
        "https://arxiv.org/abs/2402.11148",
        "https://github.com/zkxufo/TTM",
    )

    class Config(MethodConfig):
        """Options of WTTM."""

        gamma: float = Field(0.2, gt=0)
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
        logits = frozen(teacher.logits)
        logits = logits - logits.amax(1, keepdim=True)
        log_powers = self.cfg.gamma * logits
        powers = log_powers.exp()
        total = powers.sum(1, keepdim=True)
        rows = powers / logits.exp().sum(1, keepdim=True) ** self.cfg.gamma  # U q^γ / U
        log_p = full_precision(student.logits).log_softmax(1)
        return {"match": (rows * (log_powers - total.log() - log_p)).sum() / len(rows)}
