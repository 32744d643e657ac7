"""The ordinary loss on labels, as a method, so that its weight can be scheduled like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference
from kd_hf.methods.losses import batch_mean, full_precision
from kd_hf.outputs import Outputs, Target


class Task(Method):
    """Supervised loss of the class head against targets ``Y' = (1 - ε) Y + ε / K``.

    ``cross_entropy``: ``-1/B Σ_b Σ_k Y'_bk log p_bk`` with p = softmax(z); the part is called ``ce``.
    ``bce``: ``-1/B Σ_b R_k[Y'_bk log σ(z_bk) + (1 - Y'_bk) log(1 - σ(z_bk))]`` with R the mean or the sum
    over classes; the part is called ``bce``. With a threshold θ the targets are 1 where ``Y'_bk > θ``, else 0.

    Rows of mixed labels are used as they are. A sample without a label adds 0 and still counts in B. With ``strong``
    the strongly augmented view of the same images adds a part of its own, ``ce_strong`` or ``bce_strong``.
    """

    name = "task"
    paper = Reference(
        "Rethinking the Inception Architecture for Computer Vision (label smoothing)",
        "https://arxiv.org/abs/1512.00567",
    )

    class Config(MethodConfig):
        """Options of the loss on labels."""

        loss: Literal["cross_entropy", "bce"] = "cross_entropy"
        """Softmax cross-entropy, or a binary cross-entropy per class."""
        label_smoothing: float = Field(0.0, ge=0, lt=1)
        """ε: the share of the target that is spread evenly over all classes."""
        bce_reduction: Literal["mean", "sum"] = "mean"
        """How `bce` runs over classes; `sum` is K times larger."""
        bce_threshold: float | None = Field(None, ge=0, lt=1)
        """θ: classes whose share of the target is larger are fully present for `bce`, the others not at all. DeiT's and
        VkD's `--bce-loss` have 0, which needs `label_smoothing: 0`; by default the shares are used as they are."""
        strong: bool = False
        """Learn the strongly augmented view of every image too (`data.augment.strong`)."""

        @model_validator(mode="after")
        def _threshold_of_bce(self) -> Task.Config:
            if self.bce_threshold is not None and self.loss != "bce":
                raise ValueError("bce_threshold is for `loss: bce`")
            if self.bce_threshold == 0 and self.label_smoothing > 0:
                raise ValueError("with bce_threshold: 0 label smoothing makes every class present; set one of the two")
            return self

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Labels of any kind, where there are any."""
        return Needs(labels="optional", strong=cfg.strong)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"ce": scalar}`` or ``{"bce": scalar}``, and the same of the strong view where it counts."""
        part = "bce" if self.cfg.loss == "bce" else "ce"
        losses = {part: self._loss(student.logits, target)}
        if self.cfg.strong:
            assert student.strong is not None
            losses[f"{part}_strong"] = self._loss(student.strong.logits, target)
        return losses

    def _loss(self, logits: Tensor, target: Target) -> Tensor:
        logits, known = full_precision(logits), target.hard >= 0
        if self.cfg.loss == "bce":
            return batch_mean(self._binary(logits, target), known)
        labels = target.hard if target.soft is None else target.soft.to(logits.dtype)
        losses = F.cross_entropy(
            logits, labels, ignore_index=-1, label_smoothing=self.cfg.label_smoothing, reduction="none"
        )
        return batch_mean(losses, known)

    def _binary(self, logits: Tensor, target: Target) -> Tensor:
        """Binary cross-entropy over classes, per sample: ``[B]``."""
        classes = logits.shape[1]
        smoothing = self.cfg.label_smoothing
        rows = (1 - smoothing) * target.rows(classes, logits.dtype) + smoothing / classes
        if self.cfg.bce_threshold is not None:
            rows = (rows > self.cfg.bce_threshold).to(rows.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, rows, reduction="none")
        return losses.mean(1) if self.cfg.bce_reduction == "mean" else losses.sum(1)
