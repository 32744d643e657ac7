"""Masked generative distillation: rebuild the teacher's map from the student's with channels missing."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import squared_distance
from kd_hf.methods.projectors import Generator, kernel_macs
from kd_hf.outputs import Outputs, Target


class MGD(Method):
    """``generation = 1/B Σ_b ‖G(m_b · A(s_b)) - t_b‖²``, summed over channels and positions.

    s and t are the last maps before pooling. A is a 1×1 convolution where the widths differ, else nothing; m drops
    whole channels of a sample with probability λ (no rescaling); G is a 3×3 convolution, ReLU and a 3×3
    convolution. The sum makes the factor depend on the teacher's width and resolution: the paper uses 7e-5 on
    ImageNet (the default weight) and 1.2e-3 on CIFAR-100.
    """

    name = "mgd"
    weight = 7e-5
    paper = Reference(
        "Masked Generative Distillation", "https://arxiv.org/abs/2205.01529", "https://github.com/yzd-v/MGD"
    )

    class Config(MethodConfig):
        """Options of MGD."""

        student_tap: str = "stage:-1"
        """The student's map, ``[B, C, H, W]``."""
        teacher_tap: str = "stage:-1"
        """The teacher's map, of the same height and width."""
        mask_ratio: float = Field(0.15, ge=0, lt=1)
        """λ: the probability that a channel of the aligned map is dropped."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One map of each network."""
        require_teacher(cls.name, teacher, student, same_classes=False)
        return Needs(student={"feature": cfg.student_tap}, teacher={"feature": cfg.teacher_tap})

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        ours, theirs = student.taps["feature"], teacher.taps["feature"]
        for key, tap, shape in (("student_tap", cfg.student_tap, ours), ("teacher_tap", cfg.teacher_tap, theirs)):
            if len(shape) != 3:
                raise UserError(
                    f"methods.mgd.{key}: '{tap}' gives shape {shape}; expected a map (channels, height, width)"
                )
        if ours[1:] != theirs[1:]:
            raise UserError(
                f"methods.mgd: the student's '{cfg.student_tap}' has shape {ours} and the teacher's "
                f"'{cfg.teacher_tap}' {theirs}; height and width must be equal (choose other taps or image sizes)"
            )
        self.shape = theirs
        width, channels = ours[0], theirs[0]
        self.align = nn.Conv2d(width, channels, 1) if width != channels else nn.Identity()
        self.generation = Generator(channels)

    def draw(self, draws: Draws) -> Mapping[str, Tensor]:
        """``mask``: a uniform number for each sample and channel, ``[B, C_t, 1, 1]``; kept where ``>= mask_ratio``."""
        return {"mask": draws.uniform("mgd/mask", (self.shape[0], 1, 1))}

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"generation": scalar}``."""
        assert teacher is not None
        aligned = self.align(student.taps["feature"])  # [B, C_t, H, W]
        kept = draws["mask"] >= self.cfg.mask_ratio
        return {"generation": squared_distance(self.generation(aligned * kept), teacher.taps["feature"])}

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the convolutions at the teacher's resolution."""
        positions = self.shape[1] * self.shape[2]
        return Cost(parameters=super().cost().parameters, macs=kernel_macs(self.modules()) * positions)
