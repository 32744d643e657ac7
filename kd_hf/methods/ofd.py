"""Overhaul of feature distillation: features before the ReLU, up to a margin below which they need not follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, Needs, Reference, require_teacher
from kd_hf.methods.losses import frozen, full_precision, squared_distance
from kd_hf.methods.projectors import Connector, kernel_macs
from kd_hf.methods.stages import StagePairs
from kd_hf.models.parts import NORM
from kd_hf.outputs import Outputs, Target

RARE = 0.001  # a channel that is negative less often has the margin of three deviations instead


class OFD(Method):
    """``stage_i = 2^(i-n)/B Σ_b Σ_cp (f - max(t, m_c))² [f > max(t, m_c) or t > 0]`` for stages i = 1 … n.

    f is a 1×1 convolution and BatchNorm of the student's feature before the last ReLU of the stage, t the teacher's,
    and m_c the mean of the negative part of a normal variable with the shift β and the deviation |γ| of the BatchNorm
    that the teacher's channel comes from: where t is negative, f need only be below the margin. Where the teacher's
    map is larger, it is average-pooled to the student's size.

    The sum over channels and positions makes the weight depend on the teacher's width and resolution: 1e-4 on ImageNet
    (the default), 1e-3 on CIFAR-100. The authors keep the teacher in train mode, on purpose: the recipe's
    ``teacher.mode: train``; the default is eval mode.
    """

    name = "ofd"
    weight = 1e-4
    paper = Reference(
        "A Comprehensive Overhaul of Feature Distillation",
        "https://arxiv.org/abs/1904.01866",
        "https://github.com/clovaai/overhaul-distillation",
    )

    class Config(StagePairs):
        """Options of OFD: the maps, the last pair with factor 1; by default ``preact:i`` of as many last stages as both
        networks have."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Features before the ReLU of both networks, and the BatchNorms of the teacher's."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        student_taps = cfg.student_taps or _pre_activations(student)
        teacher_taps = cfg.teacher_taps or _pre_activations(teacher)
        count = min(len(student_taps), len(teacher_taps))
        roles = [f"stage_{index + 1}" for index in range(count)]
        return Needs(
            student=dict(zip(roles, student_taps[-count:], strict=True)),
            teacher=dict(zip(roles, teacher_taps[-count:], strict=True)),
            parts=tuple(f"{NORM}{tap}" for tap in teacher_taps[-count:]),
            batch_coupled=True,
            cacheable=False,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.roles = tuple(student.taps)
        self.grids: list[tuple[int, int]] = []
        for role in self.roles:
            ours, theirs = student.taps[role], teacher.taps[role]
            if len(ours) != 3 or len(theirs) != 3 or ours[1] > theirs[1] or ours[2] > theirs[2]:
                raise UserError(
                    f"methods.ofd: {role} is {ours} in the student and {theirs} in the teacher; expected maps "
                    "(channels, height, width), the teacher's as large or larger (choose other taps or image sizes)"
                )
            self.grids.append((ours[1], ours[2]))
        self.connectors = nn.ModuleList(
            Connector(student.taps[role][0], teacher.taps[role][0], relu=False) for role in self.roles
        )
        for role, norm in zip(self.roles, parts.values(), strict=True):
            # not in a checkpoint: it is a function of the teacher
            self.register_buffer(f"margin_{role}", margin(norm), persistent=False)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"stage_1": scalar, …}``, halving factors included."""
        assert teacher is not None
        losses = {}
        stages = zip(self.roles, self.connectors, self.grids, strict=True)
        for index, (role, connector, grid) in enumerate(stages):
            feature = full_precision(connector(student.taps[role]))
            goal = frozen(teacher.taps[role])
            goal = goal if goal.shape[2:] == grid else F.adaptive_avg_pool2d(goal, grid)
            with torch.no_grad():
                bound = torch.maximum(goal, self.get_buffer(f"margin_{role}"))
                # what need not be followed is its own goal: no difference and no gradient
                bound = torch.where((goal > 0) | (feature > bound), bound, feature)
            losses[role] = 0.5 ** (len(self.roles) - 1 - index) * squared_distance(feature, bound)
        return losses

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the convolutions at the student's resolutions."""
        macs = sum(
            kernel_macs(connector.modules()) * height * width
            for connector, (height, width) in zip(self.connectors, self.grids, strict=True)
        )
        return Cost(parameters=super().cost().parameters, macs=macs)


def margin(norm: nn.Module) -> Tensor:
    """m ``[C, 1, 1]``: the mean of N(β, γ²) where it is negative, or -3 |γ| where that is rare."""
    weight, shift = (frozen(norm.get_parameter(name)) for name in ("weight", "bias"))
    deviation = weight.abs().clamp(min=1e-12)
    share = torch.special.ndtr(-shift / deviation)
    density = torch.exp(-0.5 * (shift / deviation).square()) / math.sqrt(2 * math.pi)
    mean = shift - deviation * density / share
    return torch.where(share > RARE, mean, -3 * deviation)[:, None, None]


def _pre_activations(info: ModelInfo) -> tuple[str, ...]:
    """Taps before the last ReLU of every stage. Raises UserError where a stage ends in none."""
    if not info.stages or any(stage.preact is None for stage in info.stages):
        raise UserError(
            f"methods.ofd compares features before the last ReLU of a stage, and '{info.name}' has stages without one; "
            "choose networks such as ResNet, RegNet or MobileNetV1, or method reviewkd"
        )
    return tuple(f"preact:{index + 1}" for index in range(len(info.stages)))
