"""Decoupled knowledge distillation: target and non-target classes weighted apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kd_hf.methods.base import Method, MethodConfig, Needs, Outputs, Reference, Target, require_teacher
from kd_hf.methods.losses import batch_mean, frozen, full_precision, labelled, without
from kd_hf.models.info import ModelInfo


class DKD(Method):
    """``tckd = α T²/B Σ_b KL(b^q ‖ b^p)`` and ``nckd = β T²/B Σ_b KL(q̂ ‖ p̂)``.

    b is the pair (probability of the label, probability of everything else) and p̂, q̂ the softmax over the
    classes without the label, all at temperature T. Index labels only; samples without a label add 0.

    Defaults are those of ImageNet (T = 1, α = 1, β = 0.5); CIFAR-100 uses T = 4, α = 1, β = 8. The authors also
    raise the loss linearly over the first epochs: `weight: {warmup: [0, 1, 20 epochs]}`.
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
        temperature = self.cfg.temperature
        label, known = labelled(target.hard)
        ours = full_precision(student.logits) / temperature
        theirs = frozen(teacher.logits) / temperature
        label = label[:, None]
        rest, rest_t = without(ours, label), without(theirs, label)
        lse, lse_t = rest.logsumexp(1), rest_t.logsumexp(1)

        # log-odds of the label: log-sigmoid is finite where the label's probability underflows or reaches 1
        odds, odds_t = ours.gather(1, label)[:, 0] - lse, theirs.gather(1, label)[:, 0] - lse_t
        binary = odds_t.sigmoid() * (F.logsigmoid(odds_t) - F.logsigmoid(odds))
        binary = binary + (-odds_t).sigmoid() * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds))
        others = (rest_t.softmax(1) * (theirs - ours)).sum(1) + lse - lse_t
        scale = temperature**2
        return {
            "tckd": self.cfg.alpha * scale * batch_mean(binary, known),
            "nckd": self.cfg.beta * scale * batch_mean(others, known),
        }
