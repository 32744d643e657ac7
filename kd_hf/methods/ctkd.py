"""Curriculum temperature: distillation at a temperature that learns to make the student's task harder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Method, MethodConfig, Moment, Needs, Reference, require_teacher
from kd_hf.methods.dkd import decoupled
from kd_hf.methods.losses import divergence, frozen, full_precision, labelled, standardised
from kd_hf.outputs import Outputs, Target


class CTKD(Method):
    """``soft = T²/B Σ_b KL(q_b ‖ p_b)``, p and q the softmax of student and teacher logits over T; or `dkd` at that T.

    ``T = t_start + t_end σ(g)`` with one learned number g, which starts at 1. Its gradient is multiplied by a factor
    λ ≤ 0, so that descent raises the loss: ``λ_e = -(1 - cos(π min(e, E)/E)) / 2`` in epoch e, counted from 1. Values
    do not depend on λ. Both softmaxes carry the gradient to T.

    Defaults are those of ImageNet (E = 5, weight 1 beside 1 of the task loss); CIFAR-100 uses E = 10 and weight 0.9
    beside 0.1. g is a one-dimensional parameter: the authors' weight decay on it, which pulls T towards
    t_start + t_end/2, needs ``train.decay_norm_and_bias: true``. Index labels only with `dkd`, where samples without a
    label add 0.
    """

    name = "ctkd"
    paper = Reference(
        "Curriculum Temperature for Knowledge Distillation",
        "https://arxiv.org/abs/2211.16231",
        "https://github.com/zhengli97/CTKD",
    )

    class Config(MethodConfig):
        """Options of CTKD."""

        kind: Literal["kd", "dkd"] = "kd"
        """The loss at temperature T."""
        t_start: float = Field(1.0, gt=0)
        """The lowest temperature."""
        t_end: float = Field(20.0, gt=0)
        """The range of temperatures above it."""
        epochs: float = Field(5.0, gt=0)
        """E: the epochs in which λ falls from 0 to -1."""
        alpha: float = Field(1.0, ge=0)
        """Factor of the target-class part (`dkd`)."""
        beta: float = Field(2.0, ge=0)
        """Factor of the non-target part (`dkd`)."""
        logit_std: bool = False
        """Standardise the logits of both networks over the classes first."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits, and for `dkd` index labels."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, labels="hard" if cfg.kind == "dkd" else "none")

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        self.level = nn.Parameter(torch.ones(1))  # g

    def scheduled(self, moment: Moment) -> Mapping[str, float]:
        """``reversal``: λ."""
        done = min(moment.epoch / self.cfg.epochs, 1.0)
        return {"reversal": (math.cos(math.pi * done) - 1) / 2}

    def temperature(self, reversal: Tensor) -> Tensor:
        """T, a scalar, whose gradient reaches g times `reversal`."""
        level = full_precision(self.level[0])
        level = torch.lerp(level.detach(), level, reversal.to(level.dtype))
        return self.cfg.t_start + self.cfg.t_end * level.sigmoid()

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"soft": scalar}``, or ``{"tckd": scalar, "nckd": scalar}`` with their factors."""
        assert teacher is not None
        temperature = self.temperature(draws["reversal"])
        logits, reference = full_precision(student.logits), frozen(teacher.logits)
        if self.cfg.logit_std:
            logits, reference = standardised(logits), standardised(reference)
        if self.cfg.kind == "dkd":
            label, known = labelled(target.hard)
            tckd, nckd = decoupled(logits, reference, label, temperature, known)
            return {"tckd": self.cfg.alpha * tckd, "nckd": self.cfg.beta * nckd}
        log_p, log_q = ((rows / temperature).log_softmax(1) for rows in (logits, reference))
        return {"soft": divergence(log_p, log_q, temperature**2)}
