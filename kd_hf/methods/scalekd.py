"""ScaleKD: cross-attention projectors, two views of each feature, and the student seen through the teacher's end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.cross_attention import CrossAttentionProjector, PointwiseProjector, mimicking, without_mean
from kd_hf.methods.features import as_map, as_tokens, map_shape, patch_role, width
from kd_hf.methods.losses import batch_mean, frozen, full_precision
from kd_hf.models.parts import AFTER, final_tap, last_stage_entry
from kd_hf.outputs import Outputs, Target

Stage = Literal["s3", "s4"]
Factor = Annotated[float, Field(ge=0)]
Scale = Annotated[float, Field(gt=0)]
Pair = tuple[Factor, Factor]
Scales = Scale | tuple[Scale, Scale]
VIEWS = ("spatial", "alternative")
# names of the losses by stage and view, as the official code logs them
_LOSS = {"spatial": "{}", "alternative": "{}_alt"}
ENTRY, TARGET = "entry", "target"


class ScaleKD(Method):
    """``s3 + s3_alt + s4 + s4_alt``: at two stages, two views of the student's feature mimic the teacher's last one.

    With t the teacher's final patch tokens, CAP a cross-attention projector (one per stage and view) and T the rest
    of the frozen teacher behind its stage 3::

        a_v = T(CAP_3v(f_3))              s3, s3_alt = D(a_v, t)     the teacher's own end reads the student
        b_v = CAP_4v(f_4; queries a_v)    s4, s4_alt = D(b_v, t)     queries depend on the image

        D_spatial(s, t) = α_0/B Σ_b Σ_p ‖s_p/‖s_p‖ - t_p/‖t_p‖‖²
        D_alternative   = the same with α_1 after the mean over positions is taken from s and t (their zero frequency)

    Gradients pass through T, whose weights are the teacher's own, and through the queries to stage 3. The sum over
    positions makes α depend on the teacher's grid: 0.08 and 0.06 are for 7×7 (Swin); 0.016 and 0.008 for 16×16, 0.008
    and 0.004 for 24×24 (BEiT). The paper adds `kd` with temperature 1 and halves the task loss:
    ``0.5 task + 0.5 kd + scalekd``.

    The official code keeps its teacher in train mode, drop path included; the recipe's ``teacher.mode: train`` does
    too. Its four projectors have layers that no gradient reaches; here they are not built.
    """

    name = "scalekd"
    paper = Reference(
        "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
        "https://arxiv.org/abs/2411.06786",
        "https://github.com/deep-optimization/ScaleKD",
    )

    class Config(MethodConfig):
        """Options of ScaleKD."""

        taps: dict[Stage, str] | None = None
        """The student's features for `s3` and `s4`; one of them alone is fine. By default its last two stages, or for
        a plain transformer the block at three quarters of its depth and its final patch tokens."""
        teacher_entry: str | None = None
        """Where the projected stage 3 enters the teacher (``stage:i``, ``block:i``); by default before its last stage,
        or before the last two blocks of a plain transformer."""
        teacher_tap: str | None = None
        """What is mimicked: the teacher's final patch tokens, or its last map. Another tap is possible without `s3`,
        whose tokens come out of the teacher's end."""
        alpha: Pair | dict[Stage, Pair] = (0.08, 0.06)
        """(α_0, α_1) of the spatial and the alternative view, for both stages or each. A view with 0 that feeds
        nothing else is not built."""
        heads: int | dict[Stage, int] | None = None
        """Attention heads of the projectors; by default one per 64 channels of the teacher, as for Swin-B."""
        softmax_scale: Scales | dict[Stage, Scales] = 5.0
        """σ: factor on the usual scale of attention, for both views or each, for both stages or each. The authors take
        5 for Swin teachers (1 for a ConvNeXt or Swin student), 0.2 to 1 for BEiT."""
        norm: Literal["batch", "layer"] = "batch"
        """Norm in the projectors; `layer` is the authors' choice for a Swin student and does not couple samples."""
        projector: Literal["cross_attention", "pointwise"] = "cross_attention"
        """`pointwise` is the paper's baseline, a 1×1 convolution: with ``taps: {s4: …}`` and ``alpha: [α, 0]``."""

        @field_validator("taps")
        @classmethod
        def _some_stage(cls, taps: dict[Stage, str] | None) -> dict[Stage, str] | None:
            if taps is not None and not taps:
                raise ValueError("name a tap for s3, s4 or both")
            return taps

        def alphas(self, stage: Stage) -> tuple[float, float]:
            """(α_0, α_1) of a stage; (0, 0) for one that a mapping leaves out."""
            return self.alpha.get(stage, (0.0, 0.0)) if isinstance(self.alpha, dict) else self.alpha

        def scales(self, stage: Stage) -> tuple[float, float]:
            """σ of the spatial and the alternative view of a stage."""
            scale = self.softmax_scale.get(stage, 5.0) if isinstance(self.softmax_scale, dict) else self.softmax_scale
            return scale if isinstance(scale, tuple) else (scale, scale)

        def head_count(self, stage: Stage, channels: int) -> int:
            """Heads of a stage's projectors. Raises UserError when they do not divide the width."""
            wanted = self.heads.get(stage) if isinstance(self.heads, dict) else self.heads
            if wanted is None:
                most = max(1, channels // 64)
                return next(count for count in range(most, 0, -1) if channels % count == 0)
            if wanted < 1 or channels % wanted:
                fitting = [count for count in range(1, channels + 1) if channels % count == 0]
                near = min(fitting, key=lambda count: abs(count - wanted))
                raise UserError(
                    f"methods.scalekd.heads: {wanted} heads at {stage} do not divide the teacher's {channels} "
                    f"channels; the nearest number that does is {near}"
                )
            return wanted

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Features of two student stages; the teacher's last one, and its end as a live part.

        The teacher's feature at the entry is read for its shape only.
        """
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        taps = cfg.taps or _student_taps(student)
        target = cfg.teacher_tap or final_tap(teacher)
        theirs = {patch_role(TARGET, target, teacher): target}
        parts: tuple[str, ...] = ()
        if "s3" in taps:
            if target != final_tap(teacher):
                raise UserError(
                    f"methods.scalekd.teacher_tap: stage s3 ends in '{final_tap(teacher)}' of '{teacher.name}' "
                    f"and cannot be compared with '{target}'; leave this key out, or name taps for s4 only"
                )
            entry = cfg.teacher_entry or _teacher_entry(teacher)
            theirs[patch_role(ENTRY, entry, teacher)] = entry
            parts = (f"{AFTER}{entry}",)
        attends = cfg.projector == "cross_attention"
        if attends and teacher.stages and cfg.teacher_entry is None and cfg.teacher_tap is None:
            widths = {"s3": teacher.stages[-2:][0].channels, "s4": teacher.stages[-1].channels}
            for stage in taps:
                cfg.head_count(stage, widths[stage])
        return Needs(
            student={patch_role(stage, taps[stage], student): taps[stage] for stage in sorted(taps)},
            teacher=theirs,
            parts=parts,
            batch_coupled=attends and cfg.norm == "batch",
            cacheable=not parts,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.roles: dict[Stage, str] = {
            stage: role for stage in ("s3", "s4") for role in student.taps if role.startswith(stage)
        }
        self.target_role = _only(TARGET, teacher)
        goal = map_shape("methods.scalekd.teacher_tap", self.target_role, teacher.taps[self.target_role])
        goals = {"s3": _entry_shape(teacher, goal) if "s3" in self.roles else goal, "s4": goal}
        self.views = {stage: self._views(stage) for stage in self.roles}
        if goal[1:] == (1, 1) and any("alternative" in views for views in self.views.values()):
            raise UserError(
                "methods.scalekd.alpha: the alternative view is what a feature has beside its mean over positions, and "
                "the teacher's last one has a single position; use larger images, or 0 for the second number"
            )
        self.entry_grid = goals["s3"][1:]
        self.macs = 0
        self.projectors = nn.ModuleDict()
        for stage, role in self.roles.items():
            shape = map_shape(f"methods.scalekd.taps.{stage}", role, student.taps[role])
            for view in self.views[stage]:
                projector = self._projector(stage, view, shape, goals[stage])
                self.projectors[f"{stage}_{view}"] = projector
                self.macs += projector.macs()

    def _views(self, stage: Stage) -> list[str]:
        """Views of a stage that have a loss of their own, or whose tokens are the queries of one that has."""
        chained = self.cfg.projector == "cross_attention"
        later = [name for name in self.roles if name >= stage and (chained or name == stage)]
        used = [view for index, view in enumerate(VIEWS) if any(self.cfg.alphas(name)[index] for name in later)]
        if not used:
            raise UserError(f"methods.scalekd.alpha: both views of {stage} have 0; leave {stage} out of `taps` instead")
        return used

    def _projector(
        self, stage: Stage, view: str, shape: tuple[int, int, int], goal: tuple[int, int, int]
    ) -> CrossAttentionProjector | PointwiseProjector:
        channels, *grid = goal
        if self.cfg.projector == "pointwise":
            return PointwiseProjector(shape, channels, (grid[0], grid[1]))
        return CrossAttentionProjector(
            shape,
            channels,
            (grid[0], grid[1]),
            self.cfg.head_count(stage, channels),
            self.cfg.scales(stage)[VIEWS.index(view)],
            self.cfg.norm,
            own_queries=stage == next(iter(self.roles)),
        )

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return scalars ``s3``, ``s3_alt``, ``s4`` and ``s4_alt``, factors included, as far as they are asked for."""
        assert teacher is not None
        goal = as_tokens(self.target_role, frozen(teacher.taps[self.target_role]))
        goals = {"spatial": F.normalize(goal, dim=-1), "alternative": F.normalize(without_mean(goal), dim=-1)}
        tokens: dict[str, Tensor] = {}
        losses = {}
        for stage, role in self.roles.items():
            feature = as_map(role, student.taps[role])
            tokens = {view: self.projectors[f"{stage}_{view}"](feature, tokens.get(view)) for view in self.views[stage]}
            if stage == "s3":
                tokens = self._through_teacher(tokens)
            for view, factor in zip(VIEWS, self.cfg.alphas(stage), strict=True):
                if factor:
                    seen = full_precision(tokens[view])
                    seen = without_mean(seen) if view == "alternative" else seen
                    losses[_LOSS[view].format(stage)] = factor * batch_mean(mimicking(seen, goals[view]))
        return losses

    def _through_teacher(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The end of the teacher on both views at once: tokens before its last stage to final tokens."""
        (part,) = self.parts.values()
        joined = torch.cat(list(tokens.values())).transpose(1, 2).unflatten(2, self.entry_grid)
        final = part(joined).flatten(2).transpose(1, 2)
        return dict(zip(tokens, final.chunk(len(tokens)), strict=True))

    def cost(self) -> Cost:
        """Own parameters, and multiply–accumulates of the projectors (the teacher's end runs once more per view)."""
        return Cost(parameters=super().cost().parameters, macs=self.macs)


def _student_taps(student: ModelInfo) -> dict[Stage, str]:
    """The last two stages, or a late block and the final patch tokens. Raises UserError when there are neither."""
    if len(student.stages) >= 2:
        return {"s3": "stage:-2", "s4": "stage:-1"}
    if student.depth >= 2 and student.norm is not None:
        return {"s3": f"block:{max(0, student.depth * 3 // 4 - 1)}", "s4": "tokens:patch"}
    raise UserError(
        f"methods.scalekd.taps: '{student.name}' has no two stages or blocks to choose from; name taps, for instance "
        "{s3: 'module:PATH', s4: 'module:PATH'}"
    )


def _teacher_entry(teacher: ModelInfo) -> str:
    try:
        return last_stage_entry(teacher)
    except UserError as error:
        raise UserError(
            f"methods.scalekd runs the end of its teacher on stage s3: {error}; or name taps for s4 only"
        ) from error


def _only(name: str, shapes: Shapes) -> str:
    """The role that starts with `name`."""
    return next(role for role in shapes.taps if role.startswith(name))


def _entry_shape(teacher: Shapes, goal: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) where the projected tokens enter the teacher; blocks keep the final grid."""
    role = _only(ENTRY, teacher)
    shape = teacher.taps[role]
    return map_shape("methods.scalekd.teacher_entry", role, shape) if len(shape) == 3 else (width(shape), *goal[1:])
