"""Distillation of any detector's tokens: maps of the neck, [DET] tokens, states of the queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.detection.methods.matching import MatchConfig, pair_queries, require_detectors, require_index, take
from kd_hf.detection.methods.token_matching import TokenProjector, standardise_channels
from kd_hf.detection.networks.info import (
    BODY,
    MAP,
    NECK,
    QUERIES,
    VALID,
    BoxOutputs,
    DetectorInfo,
    check_tap,
    parse_tap,
)
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference
from kd_hf.methods.losses import exact, frozen, full_precision
from kd_hf.methods.orthogonal import Map
from kd_hf.outputs import Outputs, Target

_KINDS = (MAP, BODY, QUERIES, NECK)


class TokenTap(MethodConfig):
    """One pair of taps."""

    student: str
    """`map:0`, `queries:-1`, `body`, `neck`, …"""
    teacher: str | None = None
    """By default that of the same name."""
    weight: float = Field(1.0, ge=0)


class DetrTokens(Method):
    """``Σ_taps weight · mean_b mean_tokens d(norm(P s), norm(t))`` over the images b and the tokens of an image.

    P is a linear map of the student's tokens that every pair of taps has of its own. Tokens of maps are compared place
    by place. Those of queries are paired first (`match`): as numbered, which is ViDT's way, or by a bipartite matching
    of what both networks predict in the image, as in D³ETR's adaptive matching (of which nothing else is here).

    The defaults, an orthogonal P and channels standardised over all tokens of the batch, are VkD's
    (https://arxiv.org/abs/2403.06213) on all maps.
    """

    name = "detr_tokens"
    paper = Reference("D³ETR: Decoder Distillation for Detection Transformer", "https://arxiv.org/abs/2211.09768")

    class Config(MatchConfig):
        """Options of distilling tokens."""

        taps: tuple[TokenTap, ...] = ()
        """What is compared; by default every `map` of the student with the teacher's."""
        projector: Literal["none", "linear", "orthogonal"] = "orthogonal"
        """P. The orthogonal one has orthonormal rows or columns where the widths differ; `none` needs equal widths."""
        map: Map = "auto"
        """How an orthogonal P is parametrised: see OrthogonalProjection."""
        normalise: Literal["none", "token", "channels"] = "channels"
        """Of both sides: every token over its channels, or every channel over all tokens of the batch, each to mean 0
        and variance 1."""
        distance: Literal["smooth_l1", "mse", "l2"] = "smooth_l1"
        """d: mean over channels, but `l2`, which is the length of the difference."""
        masked: bool = True
        """Leave tokens of the padding out."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The taps, the student's masks of its maps, and the predictions of both where queries are matched."""
        infos = require_detectors(cls.name, student, teacher, same_classes=False)
        ours, theirs, masks, queries = {}, {}, {}, False
        for number, (one, other, _) in enumerate(_pairs(cfg, *infos)):
            for info, tap in zip(infos, (one, other), strict=True):
                _check(cls.name, info, tap)
            kind, level = parse_tap(infos[0], one)
            role = f"{kind}_{number}"
            ours[role], theirs[role] = one, other
            if kind == MAP and cfg.masked:
                masks[f"{VALID}_{number}"] = f"{VALID}:{level}"
            queries |= kind != MAP
        if queries:
            require_index(cfg, cls.name, *infos)
        predictions = queries and cfg.match == "hungarian"
        if predictions:
            require_detectors(cls.name, student, teacher, same_classes=True)
        return Needs(
            student={**ours, **masks},
            teacher=theirs,
            teacher_logits=predictions,
            batch_coupled=cfg.normalise == "channels",
            cacheable=not predictions,  # a store has no boxes
        )

    def __init__(self, cfg: Any, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.projectors = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.macs = 0
        given = [tap.weight for tap in cfg.taps] or [1.0] * len(teacher.taps)
        for (role, theirs), weight in zip(teacher.taps.items(), given, strict=True):
            ours, axis = student.taps[role], _axis(role)
            self._check_shapes(role, ours, theirs)
            self.projectors[role] = self._projector(ours[axis], theirs[axis])
            self.weights[role] = weight
            self.macs += 0 if cfg.projector == "none" else math.prod(ours) * theirs[axis]

    def _check_shapes(self, role: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        """Maps need the same size, a stack of states as many; queries may differ in number, and all in width."""
        inner = slice(1, None) if role.startswith(MAP) else slice(None, -2)
        if ours[inner] != theirs[inner]:
            found, wanted = ("×".join(map(str, shape)) for shape in (ours, theirs))
            raise UserError(
                f"methods.{self.name}: the student's {role.partition('_')[0]} is {found}, the teacher's {wanted}; maps "
                "need the same height and width, and `neck` as many stages (compare `queries:-1` instead)"
            )
        if self.cfg.projector == "none" and ours[_axis(role)] != theirs[_axis(role)]:
            raise UserError(
                f"methods.{self.name}.projector: tokens are {ours[_axis(role)]} wide in the student and "
                f"{theirs[_axis(role)]} in the teacher; use `linear` or `orthogonal`"
            )

    def _projector(self, inputs: int, outputs: int) -> nn.Module:
        if self.cfg.projector == "none":
            return nn.Identity()
        if self.cfg.projector == "linear":
            return nn.Linear(inputs, outputs)
        return TokenProjector(inputs, outputs, self.cfg.map, affine=False)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a scalar for every pair of taps: ``map_0``, ``queries_1``, … by place in the list."""
        assert teacher is not None
        with exact(student.logits):
            pairs = self._pair(student, teacher)
            return {
                role: weight * self._compare(role, student, teacher, pairs) for role, weight in self.weights.items()
            }

    def _pair(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor] | None:
        """Pairs of queries; None where all tokens are compared as they stand."""
        if self.cfg.match == "index" or all(role.startswith(MAP) for role in self.weights):
            return None
        assert isinstance(student, BoxOutputs) and isinstance(teacher, BoxOutputs)
        return pair_queries(self.cfg, student, teacher)

    def _compare(self, role: str, student: Outputs, teacher: Outputs, pairs: tuple[Tensor, Tensor] | None) -> Tensor:
        ours, theirs = full_precision(student.taps[role]), frozen(teacher.taps[role])
        if role.startswith(MAP):
            ours, theirs = (tokens.flatten(2).transpose(1, 2) for tokens in (ours, theirs))
        elif pairs is not None:
            ours, theirs = (_taken(tokens, index) for tokens, index in zip((ours, theirs), pairs, strict=True))
        ours, theirs = ours.flatten(1, -2), theirs.flatten(1, -2)  # [B, T, C]
        mask = student.taps.get(role.replace(MAP, VALID)) if role.startswith(MAP) else None
        valid = (
            torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device) if mask is None else mask.bool().flatten(1)
        )
        weights = valid / valid.sum(1, keepdim=True).clamp(min=1)
        projected = self._normalise(self.projectors[role](ours[valid]))
        distances = self._distance(projected, self._normalise(theirs[valid]))
        return (weights[valid] * distances).sum() / len(ours)

    def _normalise(self, rows: Tensor) -> Tensor:
        """``[N, C] → [N, C]``."""
        if self.cfg.normalise == "channels":
            return standardise_channels(rows)
        return F.layer_norm(rows, rows.shape[-1:]) if self.cfg.normalise == "token" else rows

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """``[N, C] → [N]``."""
        if self.cfg.distance == "l2":
            return torch.linalg.vector_norm(ours - theirs, dim=-1)
        function = F.mse_loss if self.cfg.distance == "mse" else F.smooth_l1_loss
        return function(ours, theirs, reduction="none").mean(-1)

    def cost(self) -> Cost:
        """Own parameters, and multiply–accumulates of projecting one image's tokens."""
        return Cost(parameters=super().cost().parameters, macs=self.macs)


def _axis(role: str) -> int:
    """Of the channels, in a tap's shape without the batch."""
    return 0 if role.startswith(MAP) else -1


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    """Queries in the order of `index`, of ``[B, Q, D]`` or ``[B, S, Q, D]``."""
    return take(tokens, index) if tokens.ndim == 3 else take(tokens.transpose(1, 2), index)


def _pairs(cfg: DetrTokens.Config, student: DetectorInfo, teacher: DetectorInfo) -> list[tuple[str, str, float]]:
    """Taps of the student and of the teacher, and the weight of each pair."""
    if cfg.taps:
        return [(tap.student, tap.teacher or tap.student, tap.weight) for tap in cfg.taps]
    if student.levels != teacher.levels:
        raise UserError(
            f"methods.{DetrTokens.name}.taps: '{student.name}' has {student.levels} maps and '{teacher.name}' "
            f"{teacher.levels}; say which are compared"
        )
    return [(f"{MAP}:{level}", f"{MAP}:{level}", 1.0) for level in range(student.levels)]


def _check(name: str, info: DetectorInfo, tap: str) -> None:
    check_tap(info, tap)
    if parse_tap(info, tap)[0] not in _KINDS:
        raise UserError(f"methods.{name}.taps: '{tap}' is no tap of tokens; those are {', '.join(_KINDS)}")
