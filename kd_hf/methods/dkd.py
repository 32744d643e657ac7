"""Decoupled knowledge distillation: target and non-target classes weighted apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import divergence, labelled, logit_pair, tempered, without
from kd_hf.outputs import Outputs, Target


class DKD(Method):
    """``tckd = α T²/B Σ_b KL(b^q ‖ b^p)`` and ``nckd = β T²/B Σ_b KL(q̂ ‖ p̂)``.

    b is the pair (probability of the label, probability of everything else) and p̂, q̂ the softmax over the
    classes without the label, all at temperature T. Index labels only; samples without a label add 0.

    Defaults are those of ImageNet (T = 1, α = 1, β = 0.5); CIFAR-100 uses T = 4, α = 1, β = 8. The authors also
    raise the loss linearly over the first epochs: `weight: {warmup: [0, 1, 20 epochs]}`. With ``logit_std`` p and q are
    of z-scores; its paper takes T = 2 and a weight of 9 on CIFAR-100.
    """

    name = "dkd"
    paper = Reference(
        "Decoupled Knowledge Distillation",
        "https://arxiv.org/abs/2203.08679",
        "https://github.com/megvii-research/mdistiller",
    )

    class Config(MethodConfig):
        """Options of DKD."""

        temperature: float = Field(1.0, gt=0)
        """T: divides the logits of both networks."""
        alpha: float = Field(1.0, ge=0)
        """Factor of the target-class part."""
        beta: float = Field(0.5, ge=0)
        """Factor of the non-target part."""
        logit_std: bool = False
        """Standardise the logits of both networks over the classes first."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits and index labels."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, labels="hard")

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"tckd": scalar, "nckd": scalar}``, factors included."""
        assert teacher is not None
        label, known = labelled(target.hard)
        logits, reference = logit_pair(student.logits, teacher.logits, self.cfg.logit_std)
        tckd, nckd = decoupled(logits, reference, label, self.cfg.temperature, known)
        return {"tckd": self.cfg.alpha * tckd, "nckd": self.cfg.beta * nckd}


def decoupled(
    logits: Tensor, reference: Tensor, label: Tensor, temperature: float | Tensor, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two divergences of the decoupled loss, ``T²/B Σ_b KL(b^q ‖ b^p)`` and ``T²/B Σ_b KL(q̂ ‖ p̂)``.

    Args:
        logits: of the student, ``[B, K]``.
        reference: those of the teacher.
        label: class of every sample, ``[B]``.
        temperature: T; a tensor may carry a gradient.
        counted: as in :func:`~kd_hf.methods.losses.divergence`.
    """
    label = label[:, None]
    logits, reference = tempered(logits, temperature), tempered(reference, temperature)
    rest, rest_t = without(logits, label), without(reference, label)
    log_p, log_q = rest.log_softmax(1), rest_t.log_softmax(1)

    # log-odds of the label: what log_softmax took off is the log-sum-exp of the rest, the same at every class of it
    q = log_q.exp()
    odds = logits.gather(1, label) - (q * (rest - log_p)).sum(1, keepdim=True)
    odds_t = reference.gather(1, label) - (q * (rest_t - log_q)).sum(1, keepdim=True)
    scale = temperature**2
    return divergence(_binary(odds), _binary(odds_t), scale, counted), divergence(log_p, log_q, scale, counted)


def _binary(odds: Tensor) -> Tensor:
    """Logarithm of the pair b ``[B, 2]`` from log-odds ``[B, 1]``, finite also where a probability rounds to 0 or 1."""
    return F.logsigmoid(torch.cat([odds, -odds], 1))
