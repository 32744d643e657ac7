"""FitNets: the student's middle layer, through a regressor, must be the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import as_map, map_shape, patch_role
from kd_hf.methods.losses import frozen, full_precision
from kd_hf.outputs import Outputs, Target


class FitNet(Method):
    """``hint = mean (ReLU(BN(conv(s))) - t)²`` over all elements, s and t the maps of the second stages.

    The convolution brings the student's height to the teacher's: 3×3 with stride 2 from twice the height, a transposed
    4×4 with stride 2 from half of it, else an unpadded one that is as much larger than 1×1 as the student's map is
    larger. It is there between equal widths too. BN uses the statistics of the batch. The student learns this and the
    task together, as in all published tables; the paper's two stages are not.
    """

    name = "fitnet"
    weight = 100.0
    paper = Reference(
        "FitNets: Hints for Thin Deep Nets",
        "https://arxiv.org/abs/1412.6550",
        "https://github.com/HobbitLong/RepDistiller",
    )

    class Config(MethodConfig):
        """Options of FitNets."""

        student_tap: str = "stage:2"
        """The student's map, ``[B, C, H, W]``."""
        teacher_tap: str = "stage:2"
        """The teacher's map: the hint."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One map of each network."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        return Needs(
            student={patch_role("hint", cfg.student_tap, student): cfg.student_tap},
            teacher={patch_role("hint", cfg.teacher_tap, teacher): cfg.teacher_tap},
            batch_coupled=True,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        ((role, ours),), ((role_t, theirs),) = student.taps.items(), teacher.taps.items()
        source = map_shape(f"methods.fitnet.student_tap: '{cfg.student_tap}'", role, ours)
        goal = map_shape(f"methods.fitnet.teacher_tap: '{cfg.teacher_tap}'", role_t, theirs)
        self.conv = _resizing(source, goal)
        self.bn = nn.BatchNorm2d(goal[0])
        # where a kernel runs: a transposed one at every position that it reads
        positions = source if isinstance(self.conv, nn.ConvTranspose2d) else goal
        self.macs = self.conv.weight.numel() * positions[1] * positions[2]

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"hint": scalar}``."""
        assert teacher is not None
        ((role, ours),), ((role_t, theirs),) = student.taps.items(), teacher.taps.items()
        regressed = F.relu(self.bn(self.conv(as_map(role, ours))))
        return {"hint": F.mse_loss(full_precision(regressed), frozen(as_map(role_t, theirs)))}

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the convolution."""
        return Cost(parameters=super().cost().parameters, macs=self.macs)


def _resizing(source: tuple[int, int, int], goal: tuple[int, int, int]) -> nn.Conv2d | nn.ConvTranspose2d:
    """The convolution between two shapes (channels, height, width). Raises UserError where there is none."""
    (width, rows, columns), (channels, rows_t, columns_t) = source, goal
    if rows == 2 * rows_t and (columns + 1) // 2 == columns_t:
        return nn.Conv2d(width, channels, 3, stride=2, padding=1)
    if 2 * rows == rows_t and 2 * columns == columns_t:
        return nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
    if rows >= rows_t and columns >= columns_t and rows != 2 * rows_t:
        return nn.Conv2d(width, channels, (1 + rows - rows_t, 1 + columns - columns_t))
    raise UserError(
        f"methods.fitnet: no convolution of the paper's code brings the student's map of {rows}×{columns} to the "
        f"teacher's {rows_t}×{columns_t}; the student's may be larger, or half as large (choose other taps or image "
        "sizes)"
    )
