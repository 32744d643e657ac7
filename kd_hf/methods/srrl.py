"""Softmax regression representation learning: the student's features must serve the teacher's classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import batch_mean, exact, frozen, full_precision
from kd_hf.methods.projectors import Connector, kernel_macs
from kd_hf.outputs import Outputs, Target


class SRRL(Method):
    """``x = GAP(ReLU(BN(A s)))`` from the student's last map s; t is what the teacher's classifier h receives.

    - ``fm = α/B Σ_b mean_c (x_bc - t_bc)²``;
    - ``sr = β/B Σ_b mean_k (h(x_b)_k - z_bk)²`` with z the teacher's logits, before any softmax.

    A is a 1×1 convolution without bias, also between equal widths; BN uses the statistics of the batch. h is the
    teacher's own frozen classifier: the gradient passes through it and does not change it.

    Defaults (α, β) = (1, 1) are those of ImageNet; CIFAR-100 uses (1, 5).
    """

    name = "srrl"
    paper = Reference(
        "Knowledge Distillation via Softmax Regression Representation Learning",
        "https://openreview.net/forum?id=ZzwDy_wiWv",
        "https://github.com/jingyang2017/KD_SRRL",
    )

    class Config(MethodConfig):
        """Options of SRRL."""

        alpha: float = Field(1.0, ge=0)
        """Factor of the feature part."""
        beta: float = Field(1.0, ge=0)
        """Factor of the part behind the teacher's classifier."""
        student_tap: str = "stage:-1"
        """The student's map, ``[B, C, H, W]``."""
        teacher_tap: str = "pre_logits"
        """What the teacher's classifier receives, or a map whose mean over positions that is."""
        wiring: Literal["per_sample", "last_sample"] = "per_sample"
        """`last_sample` compares every teacher logit with the batch's last student feature, as branch 1.0 of cls_KD
        does by an indexing slip; no published number is known to use it."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The student's last map, the teacher's last vector and logits, and its classifier."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        if teacher.head is None:
            raise UserError(
                f"methods.srrl runs the teacher's classifier on the student's features, and '{teacher.name}' has none "
                "that could be used apart; choose a teacher with one Linear classifier, or method mgd"
            )
        return Needs(
            student={"feature": cfg.student_tap},
            teacher={"feature": cfg.teacher_tap},
            teacher_logits=True,
            parts=("head",),
            batch_coupled=True,
            cacheable=False,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.shape, theirs = student.taps["feature"], teacher.taps["feature"]
        if len(self.shape) != 3:
            raise UserError(
                f"methods.srrl.student_tap: '{cfg.student_tap}' gives shape {self.shape}; "
                "expected a map (channels, height, width)"
            )
        width = getattr(parts["head"], "in_features", theirs[0])
        if len(theirs) not in (1, 3) or theirs[0] != width:
            raise UserError(
                f"methods.srrl.teacher_tap: '{cfg.teacher_tap}' gives shape {theirs}, and the teacher's classifier "
                f"takes {width} features; expected 'pre_logits' or a map of {width} channels"
            )
        self.connector = Connector(self.shape[0], theirs[0])

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"fm": scalar, "sr": scalar}``, factors included."""
        assert teacher is not None
        ours = full_precision(self.connector(student.taps["feature"])).mean((2, 3))  # [B, C_t]
        theirs = frozen(teacher.taps["feature"])
        theirs = theirs.mean((2, 3)) if theirs.ndim == 4 else theirs
        judged = ours if self.cfg.wiring == "per_sample" else ours[-1:]
        regression = (self._classify(judged) - frozen(teacher.logits)).square().mean(1)
        return {
            "fm": self.cfg.alpha * batch_mean((ours - theirs).square().mean(1)),
            "sr": self.cfg.beta * batch_mean(regression),
        }

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the convolution and of the teacher's classifier."""
        positions = self.shape[1] * self.shape[2]
        macs = kernel_macs(self.modules()) * positions + kernel_macs(self.parts["head"].modules())
        return Cost(parameters=super().cost().parameters, macs=macs)

    def _classify(self, features: Tensor) -> Tensor:
        """The teacher's logits for ``[B, C_t]``, computed in the teacher's own precision."""
        head = self.parts["head"]
        with exact(features):
            return full_precision(head(features.to(next(head.parameters()).dtype)))
