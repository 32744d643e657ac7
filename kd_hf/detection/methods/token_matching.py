"""Distillation of detectors with [DET] tokens: the student's tokens against the teacher's, one by one.

Both methods read the same: the decoder's memory of each level, the [DET] tokens as they leave the body, and those
tokens before and behind every decoder layer. Token i of the student learns from token i of the teacher, so query i of
both means the same only because the student learns it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import exact, frozen, full_precision
from kd_hf.methods.orthogonal import Map, OrthogonalProjection
from kd_hf.outputs import Outputs, Target

PATCH, VALID, BODY, NECK = "patch", "valid", "body", "neck"
SPREAD = 1e-6  # the least standard deviation that a channel is divided by


def standardise_channels(rows: Tensor) -> Tensor:
    """Every channel of ``[N, C]`` with mean 0 and (unbiased) variance 1 over the rows; a constant one becomes 0."""
    variance, mean = torch.var_mean(rows, 0, correction=min(1, len(rows) - 1))
    return (rows - mean) * variance.clamp(min=SPREAD**2).rsqrt()


class TokenConfig(MethodConfig):
    """Options that both methods have."""

    levels: int = Field(4, ge=1)
    """Maps of the decoder's memory."""
    masked: bool = False
    """Leave tokens of the padding out; the authors' code counts them, also in means and deviations."""


class TokenMethod(Method):
    """What both methods read, and that student and teacher have as many of it."""

    weight = 4.0
    cfg: TokenConfig
    equal_width = True

    @classmethod
    def needs(cls, cfg: TokenConfig, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """All token taps, and the student's padding masks where they matter."""
        require_teacher(cls.name, teacher, student, same_classes=False)
        taps = {f"{PATCH}_{level}": f"map:{level}" for level in range(cfg.levels)} | {BODY: BODY, NECK: NECK}
        masks = {f"{VALID}_{level}": f"{VALID}:{level}" for level in range(cfg.levels) if cfg.masked}
        return Needs(student={**taps, **masks}, teacher=taps, batch_coupled=True)

    def __init__(
        self, cfg: TokenConfig, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.roles = [role for role in teacher.taps if not role.startswith(VALID)]
        for role in self.roles:
            ours, theirs = student.taps[role], teacher.taps[role]
            axis = _channels(role)
            if _without(ours, axis) != _without(theirs, axis) or (self.equal_width and ours != theirs):
                also = " and the same width" if self.equal_width else ""
                raise UserError(
                    f"methods.{self.name}: the student's {role} tokens are {_by(ours)}, the teacher's {_by(theirs)}; "
                    f"both need the same number of queries, levels and decoder layers{also}"
                )

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compare all taps; see the class."""
        assert teacher is not None
        with exact(student.taps[BODY]):
            return self.compare(dict(self._rows(student, teacher)))

    @abstractmethod
    def compare(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Named losses of ``{role: (ours [N, C], theirs [N, C'])}``."""

    def _rows(self, student: Outputs, teacher: Outputs) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        for role in self.roles:
            mask = student.taps.get(role.replace(PATCH, VALID)) if role.startswith(PATCH) else None
            pair = full_precision(student.taps[role]), frozen(teacher.taps[role])
            ours, theirs = (tokens.movedim(_channels(role) + 1, -1) for tokens in pair)
            if mask is None:
                yield role, (ours.flatten(0, -2), theirs.flatten(0, -2))
            else:
                yield role, (ours[mask.bool()], theirs[mask.bool()])


def _channels(role: str) -> int:
    """The axis of the channels in a tap's shape without batch."""
    return {PATCH: 0, BODY: 1, NECK: 2}[role.partition("_")[0]]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


class ViDTTokens(TokenMethod):
    """``tokens = sqrt(Σ_l D(patch_l) + D(body) + S · D(neck))``, D the mean over tokens of ``‖s - t‖₂``.

    S is the number of states in the neck's tap. There is no projector and no normalisation, so both networks need the
    same width in the neck. ViDT's own numbers are with padding counted (``masked: false``) and weight 4.
    """

    name = "vidt_tokens"
    paper = Reference(
        "ViDT: An Efficient and Effective Fully Transformer-based Object Detector",
        "https://arxiv.org/abs/2110.03921",
        "https://github.com/naver-ai/vidt",
    )

    class Config(TokenConfig):
        """Options of ViDT's token matching."""

    def __init__(
        self, cfg: TokenConfig, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(cfg, student, teacher, parts)
        self.states = student.taps[NECK][0]

    def compare(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return ``{"tokens": scalar}``."""
        distances = []
        for role, (ours, theirs) in rows.items():
            distance = torch.linalg.vector_norm(ours - theirs, dim=-1).mean()
            distances.append(distance * (self.states if role == NECK else 1))
        # equal networks are at a point where the root has no derivative
        return {"tokens": torch.stack(distances).sum().clamp(min=1e-12).sqrt()}


class TokenProjector(nn.Module):
    """An orthogonal map of tokens; with `affine` a factor and an offset for each channel behind it."""

    def __init__(self, inputs: int, outputs: int, map: Map, affine: bool) -> None:
        super().__init__()
        self.projection = OrthogonalProjection(inputs, outputs, map)
        self.scale = nn.Parameter(torch.ones(outputs)) if affine else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if affine else None

    def forward(self, rows: Tensor) -> Tensor:
        """``[N, inputs] → [N, outputs]``."""
        # there are far more tokens than channels, so the matrix is formed once
        projected = F.linear(rows, self.projection.weight().to(rows.dtype))
        return projected if self.scale is None or self.bias is None else projected * self.scale + self.bias


class VkDTokens(TokenMethod):
    """``patch + body + neck = Σ_taps mean d(ŝ - t̂)`` with d smooth L1 and ``ŝ = standardise(s Wᵀ)``, ``t̂`` likewise.

    Every tap has a W with orthonormal rows or columns of its own; a channel is standardised over all tokens of the tap
    in the batch: B·H·W, B·Q, or B·S·Q. The weight is 4.

    The released code multiplies the projected channels by learned factors and adds offsets. Standardising takes both
    away again but for the factors' signs, so they do not learn; ``affine: true`` brings them back. It also divides by
    a deviation of 0 where a channel is constant, which is 0 here.
    """

    name = "vkd_tokens"
    paper = Reference(
        "VkD: Improving Knowledge Distillation using Orthogonal Projections",
        "https://arxiv.org/abs/2403.06213",
        "https://github.com/roymiles/VkD",
    )
    equal_width = False

    class Config(TokenConfig):
        """Options of VkD for detectors."""

        map: Map = "auto"
        """How W is parametrised: see OrthogonalProjection; `auto` is PyTorch's choice."""
        affine: bool = False
        """Learned factors and offsets behind W, as in the released code."""

    cfg: Config

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.projectors = nn.ModuleDict()
        self.macs = 0
        for role in self.roles:
            ours, theirs = (shapes.taps[role][_channels(role)] for shapes in (student, teacher))
            self.projectors[role] = TokenProjector(ours, theirs, cfg.map, cfg.affine)
            self.macs += math.prod(student.taps[role]) * theirs

    def compare(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return ``{"patch": scalar, "body": scalar, "neck": scalar}``."""
        losses: dict[str, Tensor] = {}
        for role, (ours, theirs) in rows.items():
            projected = standardise_channels(self.projectors[role](ours))
            kind = role.partition("_")[0]
            losses[kind] = losses.get(kind, 0) + F.smooth_l1_loss(projected, standardise_channels(theirs))
        return losses

    def cost(self) -> Cost:
        """Own parameters, and multiply–accumulates of projecting one image's tokens."""
        return Cost(parameters=super().cost().parameters, macs=self.macs)
