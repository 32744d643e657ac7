"""Multi-level logit distillation: predictions of samples, classes and batches, at five temperatures, on two views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import divergence, exact, frozen, full_precision, standardised
from kd_hf.outputs import Outputs, Target

OTHERS = (3.0, 5.0, 2.0, 6.0)  # temperatures beside T
SLIPPED = 2  # at the last of them the official code takes the weak view for the strong one


class MLKD(Method):
    """``kd + class + batch`` with P, Q ``[B, K]`` the softmax of student and teacher logits over τ = T, 3, 5, 2, 6::

        kd    = Σ_τ τ²/B Σ_b [c_b KL(q_b ‖ p_b) on the weak view + KL(q_b ‖ p_b) on the strong view]
        class = Σ_τ 1/K Σ_k d_k Σ_j (PᵀP - QᵀQ)²_kj,   batch = Σ_τ 1/B Σ_b c_b Σ_n (PPᵀ - QQᵀ)²_bn   (weak view)

    c is 1 for samples whose teacher confidence on the weak view (the largest probability at τ = 1) is at most the
    median of the batch, d the same for classes by the sum of their probabilities over the batch; the others are 0.

    That is what the official code means. As executed, ``wiring: as_executed``, c and d are averaged before they count,
    so that each is a factor near 1/2, and at τ = 2 and 6 the strong view's term is that of the weak view; the published
    numbers are of this form, with 480 epochs on CIFAR-100, which no other row of the tables has.

    The strong view is `data.augment.strong`; `task` learns from it too with ``strong: true``. CIFAR-100 uses T = 4 and
    weight 0.9 beside 0.1 of the task loss; the defaults are those of ImageNet, 0.5 of each.
    """

    name = "mlkd"
    weight = 0.5
    paper = Reference(
        "Multi-Level Logit Distillation",
        "https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html",
        "https://github.com/Jin-Ying/Multi-Level-Logit-Distillation",
    )

    class Config(MethodConfig):
        """Options of MLKD."""

        temperature: float = Field(1.0, gt=0)
        """T: the first of the five temperatures."""
        wiring: Literal["intended", "as_executed"] = "intended"
        """`as_executed` for the published numbers."""
        logit_std: bool = False
        """Standardise logits over the classes in ``kd``, and there only."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The logits of both networks on two views of every image."""
        require_teacher(cls.name, teacher, student)
        return Needs(teacher_logits=True, strong=True, batch_coupled=True, cacheable=False)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"kd": scalar, "class": scalar, "batch": scalar}``."""
        assert teacher is not None and teacher.strong is not None and student.strong is not None
        reference = frozen(teacher.logits)
        certain = reference.softmax(1)
        samples, classes = _at_most_median(certain.amax(1)), _at_most_median(certain.sum(0))
        if self.cfg.wiring == "as_executed":
            samples, classes = (share.mean().expand_as(share) for share in (samples, classes))
        pair = full_precision(student.logits), reference
        temperatures = (self.cfg.temperature, *OTHERS)
        log_p, log_q = (softened(logits, temperatures) for logits in pair)
        p, q = log_p.exp(), log_q.exp()
        if self.cfg.logit_std:
            log_p, log_q = (softened(standardised(logits), temperatures) for logits in pair)
        strong = full_precision(student.strong.logits), frozen(teacher.strong.logits)
        return {
            "kd": self._divergences(log_p, log_q, samples, strong),
            "class": class_difference(p, q, classes),
            "batch": batch_difference(p, q, samples),
        }

    def _divergences(self, log_p: Tensor, log_q: Tensor, samples: Tensor, strong: tuple[Tensor, Tensor]) -> Tensor:
        """``kd`` from log-probabilities ``[R, B, K]`` and weights ``[B]`` of the weak view, and strong logits."""
        temperatures, slipped = (self.cfg.temperature, *OTHERS), SLIPPED if self.cfg.wiring == "as_executed" else 0
        once = len(temperatures) - slipped
        weights = [(samples + (place >= once)) * temperature**2 for place, temperature in enumerate(temperatures)]
        factors = [torch.full_like(samples, temperature**2) for temperature in temperatures[:once]]
        strong = (standardised(strong[0]), standardised(strong[1])) if self.cfg.logit_std else strong
        log_p_strong, log_q_strong = (softened(logits, temperatures[:once]) for logits in strong)
        on_strong = _weighted(log_p_strong, log_q_strong, torch.stack(factors))
        return _weighted(log_p, log_q, torch.stack(weights)) + on_strong


def softened(logits: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Log-probabilities ``[R, B, K]`` of logits ``[B, K]`` at each temperature."""
    return torch.stack([logits / temperature for temperature in temperatures]).log_softmax(2)


def _weighted(log_p: Tensor, log_q: Tensor, weights: Tensor) -> Tensor:
    """``Σ_r 1/B Σ_b w_rb KL(q_rb ‖ p_rb)`` of log-probabilities ``[R, B, K]``."""
    return divergence(log_p.flatten(0, 1), log_q.flatten(0, 1), len(log_p), weights.flatten())


def _at_most_median(values: Tensor) -> Tensor:
    """1 where a value is at most the median, interpolated between the middle two of an even number; 0 elsewhere."""
    return (values <= values.quantile(0.5)).to(values.dtype)


def batch_difference(p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """``Σ_r 1/B Σ_b w_b Σ_n (P Pᵀ - Q Qᵀ)²_bn`` of rows ``[R, B, K]``, q a constant, with weights ``[B]``."""
    with exact(p):
        half = (p - q) @ (p + q).mT  # P Pᵀ - Q Qᵀ = (D Sᵀ + S Dᵀ) / 2 with D = P - Q and S = P + Q
        return (weights[:, None] * (half + half.mT).square()).sum() / (4 * p.shape[1])


def class_difference(p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """``Σ_r 1/K Σ_k w_k Σ_j (Pᵀ P - Qᵀ Q)²_kj`` of rows ``[R, B, K]``, q a constant, with weights ``[K]``.

    Where there are fewer samples than classes no K×K matrix is made: with D = P - Q, S = P + Q and W = diag(w) the sum
    is ``(⟨D W Dᵀ, S Sᵀ⟩ + ⟨S W Sᵀ, D Dᵀ⟩ + 2 ⟨D W Sᵀ, S Dᵀ⟩) / 4``, which like the difference itself vanishes with D.
    """
    batch, classes = p.shape[1:]
    if classes <= batch:
        return batch_difference(p.mT, q.mT, weights)
    with exact(p):
        difference, total = p - q, p + q
        weighted = difference * weights
        products = (
            ((weighted @ difference.mT) * (total @ total.mT)).sum()
            + (((total * weights) @ total.mT) * (difference @ difference.mT)).sum()
            + 2 * ((weighted @ total.mT) * (total @ difference.mT)).sum()
        )
        return products / (4 * classes)
