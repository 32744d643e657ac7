"""Attention transfer: where a map is large, the student's must be as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Method, Needs, Reference, require_teacher
from kd_hf.methods.losses import full_precision
from kd_hf.methods.stages import StagePairs, check_pairs, paired_maps, paired_roles
from kd_hf.outputs import Outputs, Target


class AT(Method):
    """``stage<i> = mean_b,xy (A(s_i) - A(t_i))²`` for every pair of maps; the loss is their sum, not their mean.

    A is the mean over channels of ``f^p``, as a vector of length 1 for each image. Stages are paired from the last one
    backwards, so that networks without a first stage are aligned by resolution. Of two maps the higher one is pooled to
    a square of the other's height, before the power. Maps enter as they are tapped, signed ones too. Nothing is learned
    beside the student.
    """

    name = "at"
    weight = 1000.0
    paper = Reference(
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention "
        "Transfer",
        "https://arxiv.org/abs/1612.03928",
        "https://github.com/HobbitLong/RepDistiller",
    )

    class Config(StagePairs):
        """Options of AT."""

        p: int = Field(2, ge=1)
        """The power of the map before the mean over channels; odd ones keep signs."""

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
        check_pairs(self.name, student, teacher)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"stage1": scalar, …}``, counted from the first pair."""
        assert teacher is not None
        losses = {}
        for place, (ours, theirs) in enumerate(paired_maps(student, teacher), start=1):
            losses[f"stage{place}"] = F.mse_loss(self._attention(full_precision(ours)), self._attention(theirs))
        return losses

    def _attention(self, feature: Tensor) -> Tensor:
        """A map ``[B, C, H, W]`` as ``[B, H·W]``."""
        return F.normalize(feature.pow(self.cfg.p).mean(1).flatten(1))
