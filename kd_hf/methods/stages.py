"""Maps of several stages of two networks in pairs, for methods that compare them one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import MethodConfig
from kd_hf.methods.features import as_map, map_shape, patch_role
from kd_hf.methods.losses import frozen
from kd_hf.outputs import Outputs


class StagePairs(MethodConfig):
    """Which maps are compared."""

    student_taps: tuple[str, ...] | None = Field(None, min_length=1)
    """The student's maps; by default those of all its stages that have a partner, paired from the last one on."""
    teacher_taps: tuple[str, ...] | None = Field(None, min_length=1)
    """The teacher's map for each of them."""

    @model_validator(mode="after")
    def _one_for_one(self) -> StagePairs:
        ours, theirs = self.student_taps, self.teacher_taps
        if (ours is None) != (theirs is None):
            raise ValueError("give student_taps and teacher_taps, or neither: they are paired in order")
        if ours is not None and theirs is not None and len(ours) != len(theirs):
            raise ValueError(
                f"student_taps names {len(ours)} maps and teacher_taps {len(theirs)}; they are paired in order"
            )
        return self


def paired_roles(
    method: str, cfg: StagePairs, student: ModelInfo, teacher: ModelInfo
) -> tuple[dict[str, str], dict[str, str]]:
    """Taps of the paired maps of both networks by role, in the order of the pairs.

    Raises:
        UserError: none are named, and a network has no stages to choose from.
    """
    for side, info in (("student", student), ("teacher", teacher)):
        if cfg.student_taps is None and not info.stages:
            raise UserError(
                f"methods.{method}: the {side} '{info.name}' has no stages; name maps in methods.{method}.{side}_taps"
            )
    last = [f"stage:{place}" for place in range(-min(len(student.stages), len(teacher.stages)), 0)]
    ours, theirs = cfg.student_taps or last, cfg.teacher_taps or last
    return (
        {patch_role(f"map{place}", tap, student): tap for place, tap in enumerate(ours)},
        {patch_role(f"map{place}", tap, teacher): tap for place, tap in enumerate(theirs)},
    )


def check_pairs(
    method: str, student: Shapes, teacher: Shapes
) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Channels, height and width of every pair of maps ``[C, H, W]``, student first.

    Raises:
        UserError: a tap that is no map, or maps that pooling to one height does not bring to one shape.
    """
    pairs = []
    for (role, ours), (role_t, theirs) in zip(student.taps.items(), teacher.taps.items(), strict=True):
        place = role.partition("_")[0].removeprefix("map")
        pair = (
            map_shape(f"methods.{method}.student_taps: number {place}", role, ours),
            map_shape(f"methods.{method}.teacher_taps: number {place}", role_t, theirs),
        )
        (_, height, width), (_, height_t, width_t) = pair
        square = (height > height_t and width_t == height_t) or (height < height_t and width == height)
        if (height, width) != (height_t, width_t) and not square:
            raise UserError(
                f"methods.{method}: pair {place} compares a map of {height}×{width} with one of {height_t}×{width_t}; "
                "the larger one is pooled to a square of the smaller one's height, which does not make them equal "
                "(choose other taps or image sizes)"
            )
        pairs.append(pair)
    return pairs


def paired_maps(student: Outputs, teacher: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs as maps ``[B, C, H, W]`` of one height and width, the higher one pooled to a square of the other's.

    The teacher's are in full precision and without gradient.
    """
    for (role, ours), (role_t, theirs) in zip(student.taps.items(), teacher.taps.items(), strict=True):
        student_map, teacher_map = as_map(role, ours), frozen(as_map(role_t, theirs))
        height, height_t = student_map.shape[2], teacher_map.shape[2]
        if height > height_t:
            student_map = F.adaptive_avg_pool2d(student_map, (height_t, height_t))
        elif height < height_t:
            teacher_map = F.adaptive_avg_pool2d(teacher_map, (height, height))
        yield student_map, teacher_map
