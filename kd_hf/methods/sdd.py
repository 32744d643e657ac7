"""Scale-decoupled distillation: logits of regions of the image, those that say something else than the whole more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.dkd import decoupled
from kd_hf.methods.losses import divergence, exact, frozen, full_precision, labelled, tempered
from kd_hf.methods.nkd import normalised
from kd_hf.outputs import Outputs, Target

GRID = 4  # all regions are made of the cells of this grid
STUDENT_HEAD = "student:head"
LABELS: Mapping[str, Literal["optional", "hard", "soft"]] = {"kd": "optional", "dkd": "hard", "nkd": "soft"}


class SDD(Method):
    """``1/(B R) Σ_b Σ_r ω_br l(student's logits of region r, teacher's)`` with l the loss of `kd`, `dkd` or `nkd`.

    The last map is average-pooled to 4×4 cells, and these to 2×2 and to the whole image. Each region's vector passes
    the network's own classifier: the student's, which learns from it, and the teacher's, which is frozen. ω is 2 where
    the teacher is right about a region and wrong about the whole, or the other way round, else 1. As the classifiers
    are linear, the logits of larger regions are means of those of the smallest ones.

    For `kd`, T² KL, the authors use weight 0.9 beside 0.1 of the task loss. The weight rises over the first epochs of
    CIFAR-100: `{warmup: [0, 1, 20 epochs]}`. They take scales [1, 2] for ResNet-32x4 → 8x4, VGG-13 → VGG-8 and
    ResNet-34 → ResNet-18, and [1, 2, 4] for all other pairs. Samples without a label have ω = 1 with `kd`, and add 0
    with the others.

    Where the map is no multiple of 4 pixels wide the cells overlap, so that the whole image's logits are not exactly
    the network's own. Networks that normalise between pooling and classifier (ConvNeXt) have regions without it.
    """

    name = "sdd"
    paper = Reference(
        "Scale Decoupled Distillation",
        "https://arxiv.org/abs/2403.13512",
        "https://github.com/shicaiwei123/SDD-CVPR2024",
    )

    class Config(MethodConfig):
        """Options of SDD."""

        kind: Literal["kd", "dkd", "nkd"] = "dkd"
        """The loss of a region."""
        scales: tuple[Literal[1, 2, 4], ...] = (1, 2, 4)
        """Regions a side: 1 is the whole image and comes first."""
        temperature: float = Field(4.0, gt=0)
        """T: divides the logits of both networks."""
        alpha: float = Field(1.0, ge=0)
        """Factor of the target-class part (`dkd`)."""
        beta: float = Field(8.0, ge=0)
        """Factor of the non-target part (`dkd`)."""
        gamma: float = Field(1.5, ge=0)
        """Factor of the non-target part (`nkd`)."""
        nontarget: Literal["others", "all"] = "others"
        """Classes of `nkd`'s non-target part; `all` keeps the label among them, as the official code does."""
        student_tap: str = "stage:-1"
        """The student's map whose mean over positions its classifier receives."""
        teacher_tap: str = "stage:-1"
        """The same of the teacher."""

        @field_validator("scales")
        @classmethod
        def _from_the_whole_down(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
            if scales[:1] != (1,) or list(scales) != sorted(set(scales)):
                raise ValueError("expected [1], [1, 2], [1, 4] or [1, 2, 4]")
            return scales

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """The last map and the classifier of both networks, and labels."""
        teacher = require_teacher(cls.name, teacher, student)
        for info in (student, teacher):
            if info.head is None:
                raise UserError(
                    f"methods.sdd runs the classifier of both networks on regions, and '{info.name}' has none that "
                    "could be used apart; choose networks with one Linear classifier, or method dkd"
                )
        return Needs(
            student={"feature": cfg.student_tap},
            teacher={"feature": cfg.teacher_tap},
            parts=("head",),
            student_parts=("head",),
            labels=LABELS[cfg.kind],
            cacheable=False,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        for side, shapes, head in (("student", student, STUDENT_HEAD), ("teacher", teacher, "head")):
            _check_map(side, getattr(cfg, f"{side}_tap"), shapes.taps["feature"], parts[head])

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parts of the region's loss: ``{"soft"}``, ``{"tckd", "nckd"}`` or ``{"target", "nontarget"}``."""
        assert teacher is not None
        logits = self.regions(STUDENT_HEAD, student.taps["feature"])  # [B, R, K]
        reference = frozen(self.regions("head", teacher.taps["feature"].detach()))
        label, known = labelled(target.hard)
        right = reference.argmax(2) == label[:, None]
        differs = (right != right[:, :1]) & known[:, None]
        weights = 1.0 + differs.to(logits.dtype)
        if self.cfg.kind != "kd":
            weights = weights * known[:, None]
        return self._losses(logits.flatten(0, 1), reference.flatten(0, 1), label, weights.flatten())

    def _losses(self, logits: Tensor, reference: Tensor, label: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The losses of regions ``[B R, K]`` with their weights ``[B R]``."""
        cfg = self.cfg
        if cfg.kind == "kd":
            log_p, log_q = (tempered(rows, cfg.temperature).log_softmax(1) for rows in (logits, reference))
            return {"soft": divergence(log_p, log_q, cfg.temperature**2, weights)}
        label = label.repeat_interleave(len(logits) // len(label))
        if cfg.kind == "dkd":
            tckd, nckd = decoupled(logits, reference, label, cfg.temperature, weights)
            return {"tckd": cfg.alpha * tckd, "nckd": cfg.beta * nckd}
        among_all = cfg.nontarget == "all"
        hit, nontarget = normalised(logits, reference, label, cfg.temperature, weights, among_all)
        return {"target": hit, "nontarget": cfg.gamma * nontarget}

    def cost(self) -> Cost:
        """No own parameters; the multiply–accumulates of both classifiers on the smallest regions."""
        macs = sum(head.weight.numel() for head in self.parts.values() if isinstance(head, nn.Linear))
        return Cost(parameters=0, macs=macs * max(self.cfg.scales) ** 2)

    def regions(self, head: str, feature: Tensor) -> Tensor:
        """A network's logits ``[B, R, K]`` of the regions of its map ``[B, C, H, W]``: whole first, then by rows."""
        classifier = self.parts[head]
        with exact(feature):
            cells = F.adaptive_avg_pool2d(full_precision(feature), GRID)
            cells = F.adaptive_avg_pool2d(cells, max(self.cfg.scales)).permute(0, 2, 3, 1)
            finest = full_precision(classifier(cells.to(next(classifier.parameters()).dtype))).permute(0, 3, 1, 2)
            grids = [F.adaptive_avg_pool2d(finest, scale) for scale in self.cfg.scales[:-1]] + [finest]
        return torch.cat([grid.flatten(2) for grid in grids], 2).transpose(1, 2)


def _check_map(side: str, tap: str, shape: tuple[int, ...], head: nn.Module) -> None:
    """Refuse what is no map, or not what the network's classifier receives after pooling."""
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"methods.sdd: the {side}'s classifier is a {type(head).__name__}; regions need one that is a Linear layer"
        )
    if len(shape) != 3 or shape[0] != head.in_features:
        raise UserError(
            f"methods.sdd.{side}_tap: '{tap}' gives shape {shape}, and the {side}'s classifier takes "
            f"{head.in_features} features; expected a map ({head.in_features}, height, width), for instance "
            "module:PATH of the last one before pooling"
        )
