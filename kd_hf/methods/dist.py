"""DIST: the student's predictions must correlate with the teacher's, within a sample and within a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import logit_pair, tempered
from kd_hf.methods.ranks import gathered
from kd_hf.outputs import Outputs, Target

# added to the product of norms; part of the published formula, and not small where a column of P nearly vanishes
EPSILON = 1e-8


class DIST(Method):
    """``inter = β τ² (1 - mean_b ρ(P_b, Q_b))`` and ``intra = γ τ² (1 - mean_k ρ(P_·k, Q_·k))``.

    P and Q ``[B, K]`` are the softmax of student and teacher logits over τ, ρ is Pearson's correlation: of the rows of
    a sample, and of the columns of a class over the batch. The second one depends on which images share a batch: the
    authors' is that of a process, 32 images on ImageNet.

    ``temperature`` is 1 on ImageNet and 4 on CIFAR-100, ``weight`` 2 on both.
    """

    name = "dist"
    weight = 2.0
    paper = Reference(
        "Knowledge Distillation from A Stronger Teacher",
        "https://arxiv.org/abs/2205.10536",
        "https://github.com/hunto/image_classification_sota",
    )

    class Config(MethodConfig):
        """Options of DIST."""

        temperature: float = Field(1.0, gt=0)
        """τ: divides the logits of both networks."""
        beta: float = Field(1.0, ge=0)
        """Factor of the correlation within samples."""
        gamma: float = Field(1.0, ge=0)
        """Factor of the correlation within classes."""
        logit_std: bool = False
        """Standardise the logits of both networks over the classes first."""
        gather: bool = False
        """Take the images of all processes as one batch."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The teacher's logits."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, batch_coupled=True, gathered=cfg.gather)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"inter": scalar, "intra": scalar}``, factors and τ² included."""
        assert teacher is not None
        cfg, scale = self.cfg, self.cfg.temperature**2
        pair = logit_pair(student.logits, teacher.logits, cfg.logit_std)
        rows, reference = (tempered(logits, cfg.temperature).softmax(1) for logits in pair)
        if cfg.gather:
            rows, reference = gathered(rows), gathered(reference)
        return {
            "inter": cfg.beta * scale * (1 - correlation(rows, reference).mean()),
            "intra": cfg.gamma * scale * (1 - correlation(rows.T, reference.T).mean()),
        }


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two matrices ``[R, C]``: ``[R]``, 0 where a row is constant."""
    centred, reference = (rows - rows.mean(1, keepdim=True) for rows in (student, teacher))
    lengths = torch.linalg.vector_norm(centred, dim=1) * torch.linalg.vector_norm(reference, dim=1)
    return (centred * reference).sum(1) / (lengths + EPSILON)
