"""Variational information distillation: the teacher's maps as a normal distribution that the student's maps predict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, Needs, Reference, require_teacher
from kd_hf.methods.losses import full_precision
from kd_hf.methods.projectors import kernel_macs
from kd_hf.methods.stages import StagePairs, check_pairs, paired_maps, paired_roles
from kd_hf.outputs import Outputs, Target

# keeps the variance above 0; part of the published formula
LEAST_VARIANCE = 1e-5


class VID(Method):
    """``stage<i> = mean ½((m - t)² / v + log v)`` over all elements, for every pair of maps; the loss is their sum.

    m are three 1×1 convolutions of the student's map, C_s → C_t → C_t → C_t with ReLU between them and without bias;
    ``v = softplus(λ) + 1e-5`` is one variance per channel of the teacher, learned with everything else. Stages are
    paired from the last one backwards; of two maps the higher one is pooled to a square of the other's height, before
    the convolutions. The loss may be negative.
    """

    name = "vid"
    paper = Reference(
        "Variational Information Distillation for Knowledge Transfer",
        "https://arxiv.org/abs/1904.05835",
        "https://github.com/HobbitLong/RepDistiller",
    )

    class Config(StagePairs):
        """Options of VID."""

        initial_variance: float = Field(5.0, gt=LEAST_VARIANCE)
        """v before the first step."""
        learn_variance: bool = True
        """Without, v stays what it is at first: in mdistiller it is in no optimiser, in no published number is it."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The maps of the paired stages."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        ours, theirs = paired_roles(cls.name, cfg, student, teacher)
        return Needs(student=ours, teacher=theirs)

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        pairs = check_pairs(self.name, student, teacher)
        self.stages = nn.ModuleList(_Prediction(ours[0], theirs[0], cfg) for ours, theirs in pairs)
        # of the smaller maps, at whose size the convolutions run
        self.positions = [min(ours[1], theirs[1]) * min(ours[2], theirs[2]) for ours, theirs in pairs]

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"stage1": scalar, …}``, counted from the first pair."""
        assert teacher is not None
        pairs = zip(self.stages, paired_maps(student, teacher), strict=True)
        return {f"stage{place}": stage(*maps) for place, (stage, maps) in enumerate(pairs, start=1)}

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the convolutions."""
        stages = zip(self.stages, self.positions, strict=True)
        macs = sum(kernel_macs(stage.modules()) * positions for stage, positions in stages)
        return Cost(parameters=super().cost().parameters, macs=macs)


def log_scale_of(variance: float) -> float:
    """λ that gives a variance."""
    return math.log(math.expm1(variance - LEAST_VARIANCE))


class _Prediction(nn.Module):
    """How likely a teacher's map ``[B, C_t, H, W]`` is, given the student's ``[B, C_s, H, W]``."""

    def __init__(self, width: int, channels: int, cfg: VID.Config) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(width, channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        scale = torch.full((channels,), log_scale_of(cfg.initial_variance))
        self.log_scale = nn.Parameter(scale, requires_grad=cfg.learn_variance)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The negative log-likelihood up to a constant, a mean over all elements."""
        mean = full_precision(self.regressor(student))
        variance = (F.softplus(full_precision(self.log_scale)) + LEAST_VARIANCE)[:, None, None]
        return ((mean - teacher).square() / variance + variance.log()).mean() / 2
