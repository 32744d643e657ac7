"""Probabilistic knowledge transfer: each image picks its neighbours with the probabilities it has for the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import patch_role, pooled
from kd_hf.methods.losses import exact, frozen, full_precision
from kd_hf.methods.ranks import gathered
from kd_hf.outputs import Outputs, Target

# of the published formula: added to lengths and to probabilities
EPSILON = 1e-7


class PKT(Method):
    """``neighbours = 1/B² Σ_ij P^t_ij log((P^t_ij + ε) / (P^s_ij + ε))`` with ε = 1e-7.

    P is ``(1 + cos(e_i, e_j)) / 2`` over its sum along j, i itself included, for the features e ``[B, D]`` that the
    classifiers receive; widths need not agree. The loss compares the images of a batch with each other, so its size
    matters, and of one image there is nothing to learn.
    """

    name = "pkt"
    weight = 30000.0
    least_images = 2
    paper = Reference(
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        "https://arxiv.org/abs/1803.10837",
        "https://github.com/HobbitLong/RepDistiller",
    )

    class Config(MethodConfig):
        """Options of PKT."""

        student_tap: str = "pre_logits"
        """The student's features; maps and tokens are averaged over positions."""
        teacher_tap: str = "pre_logits"
        """The teacher's features; maps and tokens are averaged over positions."""
        gather: bool = False
        """Take the images of all processes as one batch."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One feature of each network."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        return Needs(
            student={patch_role("feature", cfg.student_tap, student): cfg.student_tap},
            teacher={patch_role("feature", cfg.teacher_tap, teacher): cfg.teacher_tap},
            batch_coupled=True,
            gathered=cfg.gather,
        )

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"neighbours": scalar}``."""
        assert teacher is not None
        ((role, ours),), ((role_t, theirs),) = student.taps.items(), teacher.taps.items()
        vectors = full_precision(pooled(role, ours)), frozen(pooled(role_t, theirs))
        if self.cfg.gather:
            vectors = gathered(vectors[0]), gathered(vectors[1])
        p, q = (neighbours(rows) for rows in vectors)
        return {"neighbours": (q * ((q + EPSILON) / (p + EPSILON)).log()).mean()}


def neighbours(vectors: Tensor) -> Tensor:
    """Probabilities ``[B, B]`` with which each of the vectors ``[B, D]`` picks one of them, itself included."""
    # the norm's gradient is 0 at a zero vector, where that of a root is not a number
    directions = vectors / (torch.linalg.vector_norm(vectors, dim=1, keepdim=True) + EPSILON)
    with exact(directions):
        closeness = (directions @ directions.T + 1) / 2
    return closeness / closeness.sum(1, keepdim=True)
