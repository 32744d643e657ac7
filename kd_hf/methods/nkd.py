"""Normalised knowledge distillation: the target's probability, and the other classes among themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import cross_entropy, labelled, logit_pair, tempered, without
from kd_hf.outputs import Outputs, Target


class NKD(Method):
    """``target = -1/B Σ_b q_by log p_by`` and ``nontarget = -γ T²/B Σ_b Σ_{k≠y} q̂_bk log p̂_bk``.

    The target part is always at temperature 1; p̂ and q̂ are the softmax over the K - 1 classes other than y at
    temperature T. Both parts are cross-entropies. With mixed labels y is the argmax of the row, so the minor
    class is one of the others. Samples without a label add 0.

    ``temperature`` is 1 on ImageNet and 3 on CIFAR-100; ``gamma`` 1.5 (CNN), 1 (ViT) and 3.5 (CIFAR-100).
    """

    name = "nkd"
    paper = Reference(
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels",
        "https://arxiv.org/abs/2303.13005",
        "https://github.com/yzd-v/cls_KD",
    )

    class Config(MethodConfig):
        """Options of NKD."""

        temperature: float = Field(1.0, gt=0)
        """T: divides the logits of the non-target part only."""
        gamma: float = Field(1.5, ge=0)
        """Factor of the non-target part."""
        logit_std: bool = False
        """Standardise the logits of both networks over the classes first, for both parts."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits and labels."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, labels="soft")

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"target": scalar, "nontarget": scalar}``, γ included."""
        assert teacher is not None
        label, known = labelled(target.hard)
        logits, reference = logit_pair(student.logits, teacher.logits, self.cfg.logit_std)
        hit, nontarget = normalised(logits, reference, label, self.cfg.temperature, known)
        return {"target": hit, "nontarget": self.cfg.gamma * nontarget}


def normalised(
    logits: Tensor,
    reference: Tensor,
    label: Tensor,
    temperature: float,
    counted: Tensor | None = None,
    among_all: bool = False,
) -> tuple[Tensor, Tensor]:
    """The two cross-entropies of the normalised loss, of the target and, with T², of the other classes.

    Args:
        logits: of the student, ``[B, K]``.
        reference: those of the teacher, a constant.
        label: class of every sample, ``[B]``.
        temperature: T of the other classes.
        counted: as in :func:`~kd_hf.methods.losses.cross_entropy`.
        among_all: leave the label among the other classes.
    """
    label = label[:, None]
    confidence = reference.softmax(1).gather(1, label)
    rows, others = tempered(reference, temperature), tempered(logits, temperature)
    if not among_all:
        rows, others = without(rows, label), without(others, label)
    return (
        cross_entropy(logits.log_softmax(1).gather(1, label), confidence, counted=counted),
        cross_entropy(others.log_softmax(1), rows.softmax(1), temperature**2, counted),
    )
