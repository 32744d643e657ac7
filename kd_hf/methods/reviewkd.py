"""ReviewKD: from the last stage to the first, the student's features are fused and compared with the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import as_map, map_shape, patch_role
from kd_hf.methods.losses import frozen, full_precision
from kd_hf.methods.projectors import kernel_macs
from kd_hf.outputs import Outputs, Target

POOLED = "pooled"
PYRAMID = (4, 2, 1)  # cells a side at which features are compared beside their own resolution


class ReviewKD(Method):
    """``level_j = HCL(y_j, t_j)``: level 0 is the pooled feature, 1 … L the stages from the last to the first.

    With x_j the student's feature (a vector counts as a 1×1 map), u_0 = BN(conv1×1(x_0)) and::

        u = BN(conv1×1(x_j)),  r = u_{j-1} resized,  (g, h) = sigmoid(conv1×1([u, r]))
        u_j = g u + h r, resized to the teacher's map        y_j = BN(conv3×3(u_j))

    HCL(y, t) is the mean squared difference of the maps and, with weights 1/2, 1/4, …, of their means over 4×4, 2×2
    and 1×1 cells as far as the map is higher than that, divided by the sum of the weights. Resizing is nearest.

    t are the teacher's maps before the last ReLU of each stage, or what its stages give where they end in none.

    The default weight is that of ResNet-34 → 18 on ImageNet; ResNet-50 → MobileNetV1 uses 8. On CIFAR-100 it is 5 for
    most pairs (ResNet-56 → 20 0.6, 110 → 32 1, 32x4 → ShuffleNetV2 8) and rises over the first epochs:
    `{warmup: [0, 5, 20 epochs]}`. The authors' CIFAR code keeps the teacher in train mode (``teacher.mode: train``);
    their ImageNet code does not.
    """

    name = "reviewkd"
    paper = Reference(
        "Distilling Knowledge via Knowledge Review",
        "https://arxiv.org/abs/2104.09044",
        "https://github.com/dvlab-research/ReviewKD",
    )

    least_images = 2  # of a single one the BatchNorm on 1×1 maps has no statistics

    class Config(MethodConfig):
        """Options of ReviewKD."""

        preact: bool = True
        """Take the student's maps before the last ReLU of each stage, where its stages end in one; CIFAR-100's numbers
        are of maps after it."""
        mid_channels: int = Field(512, gt=0)
        """Width in which features are fused, at most; it is the student's pooled width where that is smaller. The
        authors use 256 for MobileNetV1 on ImageNet."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Maps of the last stages that both networks have, and what their classifiers receive."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        count = min(len(student.stages), len(teacher.stages))
        places = range(-1, -count - 1, -1)
        student_taps = [f"{'preact' if cfg.preact and _has_relus(student) else 'stage'}:{place}" for place in places]
        teacher_taps = [f"{'preact' if _has_relus(teacher) else 'stage'}:{place}" for place in places]
        return Needs(
            student=_roles(student_taps, student),
            teacher=_roles(teacher_taps, teacher),
            batch_coupled=True,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.roles = list(zip(student.taps, teacher.taps, strict=True))
        mid_channels = min(cfg.mid_channels, student.taps[POOLED][0])
        self.levels = nn.ModuleList()
        self.grids = []
        for role, role_t in self.roles:
            channels, *grid = _map_shape("student", role, student.taps[role])
            channels_t, *grid_t = _map_shape("teacher", role_t, teacher.taps[role_t])
            self.levels.append(Fusion(channels, mid_channels, channels_t, fused=role != POOLED))
            self.grids.append(((grid[0], grid[1]), (grid_t[0], grid_t[1])))

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"level_0": scalar, …}``."""
        assert teacher is not None
        losses = {}
        review: Tensor | None = None
        for index, (role, role_t) in enumerate(self.roles):
            feature, goal = _as_map(role, student.taps[role]), _as_map(role_t, frozen(teacher.taps[role_t]))
            review, seen = self.levels[index](feature, review, self.grids[index][1])
            losses[f"level_{index}"] = hierarchical_distance(full_precision(seen), goal)
        return losses

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the convolutions at their resolutions."""
        macs = 0
        for level, ((height, width), (height_t, width_t)) in zip(self.levels, self.grids, strict=True):
            assert isinstance(level, Fusion)
            macs += kernel_macs([*level.expand.modules()]) * height_t * width_t
            macs += kernel_macs([*level.reduce.modules(), *([level.gate] if level.gate else [])]) * height * width
        return Cost(parameters=super().cost().parameters, macs=macs)


class Fusion(nn.Module):
    """One level: the student's map brought to the common width, fused with the level before, and widened.

    Args:
        channels: of the student's map.
        mid_channels: of the fused map.
        goal_channels: of the teacher's map.
        fused: whether there is a level before.
    """

    def __init__(self, channels: int, mid_channels: int, goal_channels: int, fused: bool) -> None:
        super().__init__()
        self.reduce = _normed(nn.Conv2d(channels, mid_channels, 1, bias=False))
        self.gate = nn.Conv2d(2 * mid_channels, 2, 1) if fused else None
        self.expand = _normed(nn.Conv2d(mid_channels, goal_channels, 3, padding=1, bias=False))

    def forward(self, feature: Tensor, review: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the fused map, ``[B, D, h, w]`` with (h, w) = `grid`, and what is compared, ``[B, C_t, h, w]``."""
        fused = self.reduce(feature)
        if self.gate is not None and review is not None:
            review = _resized(review, fused.shape[2:])
            gates = self.gate(torch.cat([fused, review], 1)).sigmoid()
            fused = gates[:, :1] * fused + gates[:, 1:] * review
        fused = _resized(fused, grid)
        return fused, self.expand(fused)


def hierarchical_distance(feature: Tensor, goal: Tensor) -> Tensor:
    """HCL of maps ``[B, C, H, W]``: mean squares of their difference and, less and less, of its means over cells."""
    difference = feature - goal
    height, width = difference.shape[2:]
    total, weights, weight = difference.square().mean(), 1.0, 1.0
    pooled = difference  # pooling is linear, so the difference is pooled and not both maps
    for cells in PYRAMID:
        if cells >= height:
            continue
        # cells of a coarser grid are means of finer ones where the finer ones do not overlap
        nested = height % pooled.shape[2] == 0 and width % pooled.shape[3] == 0 and pooled.shape[3] % cells == 0
        pooled = F.adaptive_avg_pool2d(pooled if nested else difference, cells)
        weight /= 2
        total = total + weight * pooled.square().mean()
        weights += weight
    return total / weights


def _normed(convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution, its kernel uniform of variance 1 / fan-in, and BatchNorm."""
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


def _resized(feature: Tensor, grid: tuple[int, ...]) -> Tensor:
    return feature if feature.shape[2:] == grid else F.interpolate(feature, size=tuple(grid), mode="nearest")


def _has_relus(info: ModelInfo) -> bool:
    return all(stage.preact is not None for stage in info.stages)


def _roles(taps: list[str], info: ModelInfo) -> dict[str, str]:
    """Taps of a network by role, from the pooled feature to the first stage."""
    levels = {patch_role(f"level{index + 1}", tap, info): tap for index, tap in enumerate(taps)}
    return {POOLED: "pre_logits", **levels}


def _map_shape(side: str, role: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if role == POOLED and len(shape) == 1:
        return shape[0], 1, 1
    return map_shape(f"methods.reviewkd: {role} of the {side}", role, shape)


def _as_map(role: str, value: Tensor) -> Tensor:
    return value[:, :, None, None] if value.ndim == 2 else as_map(role, value)
