"""Relational knowledge distillation: distances between images, and angles between three, must be the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import patch_role, pooled
from kd_hf.methods.losses import frozen, full_precision
from kd_hf.methods.ranks import gathered
from kd_hf.outputs import Outputs, Target

# rows that are nearer than this count as equal: their direction would be a quotient of rounding errors
NEAREST = 1e-6
# entries of the cubes of angles that exist at a time
_CHUNK = 2**22


class RKD(Method):
    """``distance = λ_d mean_ij h(d^s_ij, d^t_ij)`` and ``angle = λ_a mean_ijk h(a^s_ijk, a^t_ijk)``, h the smooth L1.

    For the features e ``[B, D]`` that the classifiers receive, d is ``|e_i - e_j|`` over its mean (of the pairs i ≠ j;
    the mean is differentiated too) and a the cosine of the angle at i between j and k, 0 where i is j or k. Widths
    need not agree. The means run over all B² and B³ entries. The loss compares the images of a batch with each other,
    so its size matters, and of two images there is nothing to learn: their only distance is its own mean.

    Angles come from the distances by the law of cosines, and their gradient with their value, so that nothing of size
    B²·D or B³ is kept. Two equal rows have no direction and no gradient; the published code gives 1e12 there.
    """

    name = "rkd"
    least_images = 3
    paper = Reference(
        "Relational Knowledge Distillation",
        "https://arxiv.org/abs/1904.05068",
        "https://github.com/HobbitLong/RepDistiller",
    )

    class Config(MethodConfig):
        """Options of RKD."""

        distance_weight: float = Field(25.0, ge=0)
        """λ_d: factor of the distances."""
        angle_weight: float = Field(50.0, ge=0)
        """λ_a: factor of the angles."""
        squared: bool = False
        """Compare squared distances."""
        normalise: bool = False
        """Bring the features to length 1 first."""
        student_tap: str = "pre_logits"
        """The student's features; maps and tokens are averaged over positions."""
        teacher_tap: str = "pre_logits"
        """The teacher's features; maps and tokens are averaged over positions."""
        gather: bool = False
        """Take the images of all processes as one batch; every process then computes all angles."""

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
        """Return ``{"distance": scalar, "angle": scalar}``, factors included."""
        assert teacher is not None
        ((role, ours),), ((role_t, theirs),) = student.taps.items(), teacher.taps.items()
        vectors = full_precision(pooled(role, ours)), frozen(pooled(role_t, theirs))
        if self.cfg.gather:
            vectors = gathered(vectors[0]), gathered(vectors[1])
        if self.cfg.normalise:
            vectors = F.normalize(vectors[0]), F.normalize(vectors[1])
        lengths, lengths_t = (distances(rows) for rows in vectors)
        relative, relative_t = (over_mean(rows, self.cfg.squared) for rows in (lengths, lengths_t))
        return {
            "distance": self.cfg.distance_weight * F.smooth_l1_loss(relative, relative_t),
            "angle": self.cfg.angle_weight * angle_difference(lengths, lengths_t),
        }


def distances(vectors: Tensor) -> Tensor:
    """``|e_i - e_j|`` of rows ``[B, D]`` as ``[B, B]``: exact also where a product of the rows would cancel."""
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")


def over_mean(lengths: Tensor, squared: bool = False) -> Tensor:
    """Distances ``[B, B]``, or their squares, over the mean of those of different images; 0 on the diagonal."""
    count = len(lengths)
    values = lengths.clamp(min=NEAREST)
    values = values.square() if squared else values
    values = values.masked_fill(torch.eye(count, dtype=torch.bool, device=lengths.device), 0.0)
    # of one image the mean is of nothing
    return values / (values.sum() / max(count * (count - 1), 1)).clamp(min=NEAREST**2)


class _AngleDifference(torch.autograd.Function):
    """Mean of the smooth L1 between the cosines of all angles, and its gradient, one slice of corners after another.

    With c the squares of the distances and r their inverse roots, ``a_ijk = (c_ij + c_ik - c_jk) r_ij r_ik / 2``.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        count = len(student)
        squares, squares_t = student.square(), teacher.square()
        inverse, inverse_t = (torch.where(side > NEAREST, 1 / side, 0.0) for side in (student, teacher))
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        step = max(1, _CHUNK // count**2)
        for first in range(0, count, step):
            corners = slice(first, first + step)
            angles = _cosines(squares, inverse, corners)
            difference = angles - _cosines(squares_t, inverse_t, corners)
            total += F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="sum")
            slope = difference.clamp_(-1, 1)
            gradient[corners] -= inverse[corners].square() * (slope * angles).sum(2)
            slope *= inverse[corners, :, None] * inverse[corners, None, :] / 2
            gradient[corners] += 2 * slope.sum(2)
            gradient -= slope.sum(0)
        ctx.save_for_backward(2 * student * gradient / count**3)
        return total / count**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None


def _cosines(squares: Tensor, inverse: Tensor, corners: slice) -> Tensor:
    """Cosines of the angles at some corners, ``[corners, B, B]``."""
    rows, inverse_rows = squares[corners], inverse[corners]
    cosines = rows[:, :, None] + rows[:, None, :] - squares
    return cosines.mul_(inverse_rows[:, :, None]).mul_(inverse_rows[:, None, :]).div_(2)


def angle_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all B³ of the smooth L1 between the cosines that two matrices of distances ``[B, B]`` imply."""
    return _AngleDifference.apply(student, teacher)
