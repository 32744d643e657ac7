"""VkD: an orthogonal projection of the student's pooled feature onto the teacher's normalised one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import patch_role, pooled, width
from kd_hf.methods.losses import batch_mean, divergence, frozen, full_precision
from kd_hf.methods.orthogonal import Map, OrthogonalProjection
from kd_hf.models.parts import final_tap
from kd_hf.outputs import Outputs, Target

FEATURE = "feature"


def standardise_rows(features: Tensor) -> Tensor:
    """Every sample with mean 0 and variance 1 over its channels, as LayerNorm without weights: ``[B, C] → [B, C]``."""
    return F.layer_norm(features, features.shape[1:])


def standardise(features: Tensor) -> Tensor:
    """Every channel with mean 0 and variance 1 over the batch: ``[B, C] → [B, C]``."""
    variance, mean = torch.var_mean(features, 0, correction=0)
    return (features - mean) * (variance + 1e-5).rsqrt()


def whiten(features: Tensor, shrinkage: float) -> Tensor:
    """``(x - mean) L⁻ᵀ`` over the batch, ``L Lᵀ = (1 - ε) Σ + ε 1``: ``[B, C] → [B, C]`` of covariance about 1."""
    centred = features - features.mean(0)
    covariance = centred.T @ centred / max(len(features) - 1, 1)
    eye = torch.eye(len(covariance), dtype=features.dtype, device=features.device)
    factor = torch.linalg.cholesky((1 - shrinkage) * covariance + shrinkage * eye)
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


class VkD(Method):
    """``feature = α/(B C_t) Σ_b Σ_c d(p_bc - q_bc)`` and ``logits = γ/B Σ_b KL(softmax(y_t) ‖ softmax(y_s))``.

    ``p = s̄ Wᵀ`` with W on the Stiefel manifold and s̄ the mean over the student's patches; ``q`` is the teacher's
    pooled feature, normalised per sample over its channels. d is the smooth L1 distance (x²/2 below 1). y_s are the
    logits of the distillation head where the student has one, else of its only head; T = 1.

    Where the teacher is at least as wide as the student, ``WᵀW = 1`` keeps the inner products between samples, which
    is the paper's argument; a narrower teacher leaves ``W Wᵀ = 1``, which drops a subspace.

    The paper describes the exponential of a C_t×C_t matrix and the squared error; the released code, whose defaults
    are these, takes PyTorch's orthogonal parametrisation (Householder unless the widths agree) and smooth L1. In that
    code weight decay sets the projection to zero at the first step; ``truncated_signs: true`` brings that back. It
    is not known which published numbers had a living projection.
    """

    name = "vkd"
    paper = Reference(
        "VkD: Improving Knowledge Distillation using Orthogonal Projections",
        "https://arxiv.org/abs/2403.06213",
        "https://github.com/roymiles/VkD",
    )

    class Config(MethodConfig):
        """Options of VkD."""

        alpha: float = Field(1.0, ge=0)
        """α: factor of the feature part."""
        gamma: float = Field(1.0, ge=0)
        """γ: factor of the logit part; at 0 the teacher may have other classes."""
        student_tap: str | None = None
        """The student's feature; by default its final patch tokens, or its last map."""
        teacher_tap: str | None = None
        """The teacher's feature; by default likewise."""
        map: Map = "auto"
        """How W is parametrised: see OrthogonalProjection; `auto` is PyTorch's choice."""
        truncated_signs: bool = False
        """Truncate the diagonal of the Householder parameter, as the released code: W dies under weight decay."""
        normalise: Literal["layer_norm", "standardise", "whiten", "none"] = "layer_norm"
        """Of the features: per sample over channels (discriminative tasks); per channel over the batch; whitened over
        the batch (the paper's choice for generative tasks)."""
        normalise_side: Literal["teacher", "both"] = "teacher"
        """Whether the projected student is normalised as well."""
        shrinkage: float = Field(1e-3, gt=0, lt=1)
        """ε of `whiten`: how far the covariance is drawn to the identity, so that a small batch has an inverse."""
        distance: Literal["smooth_l1", "mse"] = "smooth_l1"
        """d: smooth L1 as in the released code, or x² as in the authors' algorithm."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One feature of each network, the teacher's logits, and the student's second head where it has one."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=cfg.gamma > 0)
        if cfg.alpha == cfg.gamma == 0:
            raise UserError("methods.vkd: alpha and gamma are both 0, so there is nothing to learn")
        ours = cfg.student_tap or final_tap(student)
        theirs = cfg.teacher_tap or final_tap(teacher)
        reads = cfg.alpha > 0
        return Needs(
            student={patch_role(FEATURE, ours, student): ours} if reads else {},
            teacher={patch_role(FEATURE, theirs, teacher): theirs} if reads else {},
            teacher_logits=cfg.gamma > 0,
            dist_head=cfg.gamma > 0 and student.dist_head is not None,
            batch_coupled=cfg.normalise in ("standardise", "whiten"),
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.projector: OrthogonalProjection | None = None
        if cfg.alpha > 0:
            ((self.role, ours),) = student.taps.items()
            ((self.teacher_role, theirs),) = teacher.taps.items()
            self.projector = OrthogonalProjection(width(ours), width(theirs), cfg.map, cfg.truncated_signs)
        normalisers: Mapping[str, Callable[[Tensor], Tensor]] = {
            "layer_norm": standardise_rows,
            "standardise": standardise,
            "whiten": partial(whiten, shrinkage=cfg.shrinkage),
            "none": nn.Identity(),
        }
        self.normalise = normalisers[cfg.normalise]

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"feature": scalar, "logits": scalar}``, factors included; a part with factor 0 is left out."""
        assert teacher is not None
        losses = {}
        if self.projector is not None:
            losses["feature"] = self.cfg.alpha * self._feature(self.projector, student, teacher)
        if self.cfg.gamma > 0:
            logits = student.logits if student.dist_logits is None else student.dist_logits
            ours, theirs = full_precision(logits).log_softmax(1), frozen(teacher.logits).log_softmax(1)
            losses["logits"] = divergence(ours, theirs, self.cfg.gamma)
        return losses

    def _feature(self, projector: OrthogonalProjection, student: Outputs, teacher: Outputs) -> Tensor:
        with torch.autocast(student.logits.device.type, enabled=False):
            projected = projector(pooled(self.role, full_precision(student.taps[self.role])))  # [B, C_t]
            wanted = self.normalise(pooled(self.teacher_role, frozen(teacher.taps[self.teacher_role])))
            if self.cfg.normalise_side == "both":
                projected = self.normalise(projected)
            distance = F.smooth_l1_loss if self.cfg.distance == "smooth_l1" else F.mse_loss
            return batch_mean(distance(projected, wanted, reduction="none").mean(1))

    def cost(self) -> Cost:
        """Own parameters, and multiply–accumulates of projecting one image (not of the batch's one k×k factor)."""
        if self.projector is None:
            return super().cost()
        passes = {"qr": 1, "matrix_exp": 3, "householder": 4}[self.projector.map]
        return Cost(parameters=super().cost().parameters, macs=passes * self.projector.original.numel())
