"""OFA-KD: heads on the student's stages speak in logits, where features of other architectures cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import as_tokens, map_shape, patch_role, prefix_length
from kd_hf.methods.losses import cross_entropy, frozen, full_precision, labelled, tempered
from kd_hf.methods.projectors import kernel_macs
from kd_hf.outputs import Outputs, Target

StageNumber = Literal[1, 2, 3, 4]
Epsilon = Annotated[float, Field(gt=0)]
LAST = 4
GRID, HEADS = 7, 4  # patches a side to which tokens are merged; attention heads of the blocks behind that
# how a tapped feature is read: a map, tokens of which the first is the class token, or tokens without one
MAP, CLASS, TOKENS = "map", "class", "tokens"


class OFA(Method):
    """``logits = α ofa(z_s, ε)`` and ``stage_i = β ofa(head_i(f_i), ε_i)`` for stages i of the student, with::

        ofa(z, ε) = -1/B Σ_b Σ_k [(q_bk + e_bk)^ε - e_bk] log p_bk

    p and q are the softmax of z and of the teacher's logits over T; e is 1 at the label (with mixed labels the argmax
    of the row) and 0 elsewhere, and 0 throughout without a label. ε = 1 is cross-entropy with q; above it, what the
    teacher says of the label counts more than of the other classes.

    Heads on maps: LAST - i times two separable convolutions that halve the map and double the width, then pooling and a
    classifier; behind the last stage a 1×1 convolution instead. The last width is the larger of both networks' final
    ones. Heads on tokens: 2×2 patches are merged until 7×7 are left, LAST - i (at least one) transformer blocks, and a
    classifier of the class token, or of the mean where there is none. They are fixed to the image size of the run.

    Published: ε = 1.5 for a CNN that learns from a transformer on ImageNet, 1 on CIFAR-100; the task loss has label
    smoothing 0.1.
    """

    name = "ofa"
    paper = Reference(
        "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        "https://arxiv.org/abs/2310.19444",
        "https://github.com/Hao840/OFAKD",
    )

    class Config(MethodConfig):
        """Options of OFA."""

        taps: dict[StageNumber, str] | None = Field(None, min_length=1)
        """Stage → feature of the student, of 1 to 4 with 4 the last. By default its last four stages, or for a plain
        transformer what blocks 2, 4, 10 and 12 of 12 give, and the same shares of other depths."""
        eps: Epsilon | tuple[Epsilon, ...] = 1.5
        """ε for all heads and the student's own logits, or one for each stage, in order, and a last one for these."""
        temperature: float = Field(1.0, gt=0)
        """T: divides the logits of both networks; there is no factor T²."""
        alpha: float = Field(1.0, ge=0)
        """Factor of the student's own logits."""
        beta: float = Field(1.0, ge=0)
        """Factor of each head."""
        width: int | None = Field(None, gt=0)
        """Channels that the classifiers of heads receive, instead of the networks' final ones."""

        @model_validator(mode="after")
        def _one_for_each(self) -> OFA.Config:
            if self.taps is not None and isinstance(self.eps, tuple) and len(self.eps) != len(self.taps) + 1:
                raise ValueError(
                    f"`eps` has {len(self.eps)} values; {len(self.taps)} stages and the logits need one each"
                )
            return self

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Features of the student's stages, the teacher's logits, and labels where there are some."""
        require_teacher(cls.name, teacher, student)
        taps = cfg.taps or _stage_taps(student)
        if isinstance(cfg.eps, tuple) and len(cfg.eps) != len(taps) + 1:
            raise UserError(
                f"methods.ofa.eps has {len(cfg.eps)} values, and '{student.name}' has {len(taps)} stages with a head; "
                f"give {len(taps) + 1}, the last one for its own logits, or a single number"
            )
        roles = {_role(stage, taps[stage], student): taps[stage] for stage in sorted(taps)}
        normalised = any(_kind(role) == MAP and _stage(role) < LAST for role in roles)
        return Needs(student=roles, teacher_logits=True, labels="optional", batch_coupled=normalised)

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        self.roles = sorted(student.taps, key=_stage)
        self.heads = nn.ModuleDict()
        shapes = {role: map_shape(f"methods.ofa.taps: {role}", role, student.taps[role]) for role in self.roles}
        last = shapes[self.roles[-1]][0]
        for role, shape in shapes.items():
            stage = _stage(role)
            if _kind(role) == MAP:
                width = cfg.width or max(last, teacher.width)
                self.heads[role] = MapHead(shape, LAST - stage, width, student.num_classes)
            else:
                with_class = prefix_length(role) if _kind(role) == CLASS else 0
                width = cfg.width or last
                self.heads[role] = TokenHead(shape, max(LAST - stage, 1), width, student.num_classes, with_class)
        self.eps = cfg.eps if isinstance(cfg.eps, tuple) else (cfg.eps,) * (len(self.roles) + 1)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"logits": scalar, "stage_i": scalar, …}``, factors included."""
        assert teacher is not None
        q = tempered(frozen(teacher.logits), self.cfg.temperature).softmax(1)
        rows = {eps: enhanced(q, target.hard, eps) for eps in set(self.eps)}
        losses = {"logits": self._loss(student.logits, rows[self.eps[-1]], self.cfg.alpha)}
        for role, eps in zip(self.roles, self.eps[:-1], strict=True):
            # a class token goes through the head with the patches; other tokens before them are left out
            feature = student.taps[role] if _kind(role) != TOKENS else as_tokens(role, student.taps[role])
            logits = self.heads[role](feature)
            losses[f"stage_{_stage(role)}"] = self._loss(logits, rows[eps], self.cfg.beta)
        return losses

    def _loss(self, logits: Tensor, rows: Tensor, factor: float) -> Tensor:
        return cross_entropy(tempered(full_precision(logits), self.cfg.temperature).log_softmax(1), rows, factor)

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the heads."""
        macs = sum(head.macs for head in self.heads.values() if isinstance(head, (MapHead, TokenHead)))
        return Cost(parameters=super().cost().parameters, macs=macs)


def enhanced(q: Tensor, hard: Tensor, eps: float) -> Tensor:
    """``(q + e)^ε - e`` of probabilities ``[B, K]`` with e one-hot of labels ``[B]``, or zero where these are -1."""
    if eps == 1:
        return q
    label, known = labelled(hard)
    hit = q.gather(1, label[:, None])
    hit = torch.where(known[:, None], (hit + 1).pow(eps) - 1, hit.pow(eps))
    return q.pow(eps).scatter_(1, label[:, None], hit)


class SeparableConvolutions(nn.Sequential):
    """Depthwise 3×3 of stride 2, 1×1, BatchNorm and ReLU, then the same with stride 1; ``[B, C, H, W]`` is halved."""

    def __init__(self, width: int, channels: int) -> None:
        depthwise = partial(nn.Conv2d, width, width, 3, padding=1, groups=width, bias=False)
        super().__init__(
            depthwise(stride=2),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            depthwise(stride=1),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class MapHead(nn.Sequential):
    """Logits of a map ``[B, C, H, W]`` through `blocks` halvings, or a 1×1 convolution where there is none."""

    def __init__(self, shape: tuple[int, int, int], blocks: int, width: int, classes: int) -> None:
        channels, height, grid_width = shape
        widths = [channels * 2**index for index in range(blocks)] + [width]
        layers: list[nn.Module] = [SeparableConvolutions(*widths[index : index + 2]) for index in range(blocks)]
        layers = layers or [nn.Conv2d(channels, width, 1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
        self.apply(_initialise)
        self.macs = width * classes
        for index, layer in enumerate(layers):
            scale = 2 ** min(index + 1, blocks)
            self.macs += kernel_macs(layer.modules()) * math.ceil(height / scale) * math.ceil(grid_width / scale)


class PatchMerging(nn.Module):
    """LayerNorm and Linear of 2×2 neighbouring tokens: ``[B, S S, C] → [B, S S / 4, C']``."""

    def __init__(self, side: int, width: int, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, channels, bias=False)
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Merge; neighbours are joined column by column."""
        grid = tokens.unflatten(1, (self.side // 2, 2, self.side // 2, 2))  # [B, rows, row, columns, column, C]
        joined = grid.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        return self.activation(self.reduction(self.norm(joined)))


class TokenHead(nn.Module):
    """Logits of tokens ``[B, N, C]``, or of a map of them ``[B, C, S, S]``.

    Args:
        shape: (C, S, S) of the patches.
        depth: transformer blocks.
        width: of the merged tokens.
        classes: K.
        prefix: tokens before the patches, of which the first is the class token; 0 takes the mean of the patches.
    """

    def __init__(self, shape: tuple[int, int, int], depth: int, width: int, classes: int, prefix: int) -> None:
        super().__init__()
        channels, side, columns = shape
        merges = max(int(math.log2(side / GRID)), 0)
        if side != columns or side % 2**merges or width % HEADS or (width != channels and (prefix or not merges)):
            raise UserError(
                f"methods.ofa: no head for {side}×{columns} tokens of {channels} channels that ends in {width}; "
                f"expected a square of {GRID}, {2 * GRID}, {4 * GRID}, … or fewer than {2 * GRID} tokens a side, and "
                f"a width that {HEADS} divides, the tokens' own where there is a class token or nothing to merge"
            )
        self.prefix = prefix
        self.merges = nn.Sequential()
        for index in range(merges):
            # as published: of several, the last one is linear
            activation = nn.GELU() if index == 0 or index < merges - 1 else nn.Identity()
            self.merges.append(PatchMerging(side // 2**index, width if index else channels, width, activation))
        norm: Any = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.Sequential(*(Block(width, HEADS, norm_layer=norm) for _ in range(depth)))
        self.classifier = nn.Linear(width, classes)
        self.apply(_initialise)
        patches = (side // 2**merges) ** 2
        tokens = patches + prefix
        self.macs = kernel_macs([self.classifier]) + kernel_macs(self.blocks.modules()) * tokens
        self.macs += 2 * depth * tokens**2 * width
        self.macs += sum(kernel_macs(m.modules()) * patches * 4 ** (merges - 1 - i) for i, m in enumerate(self.merges))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        tokens = as_tokens("", feature)
        first, patches = tokens[:, : self.prefix], self.merges(tokens[:, self.prefix :])
        tokens = self.blocks(torch.cat([first, patches], 1) if self.prefix else patches)
        return self.classifier(tokens[:, 0] if self.prefix else tokens.mean(1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _stage_taps(student: ModelInfo) -> dict[StageNumber, str]:
    """The student's stages by number, the last one being 4. Raises UserError when it has neither stages nor blocks."""
    numbers: tuple[StageNumber, ...] = (1, 2, 3, 4)
    if student.blocks:
        places = {
            number: max(1, round(student.depth * share / 12)) - 1
            for number, share in zip(numbers, (2, 4, 10, 12), strict=True)
        }
        # a shallow network has fewer: each block feeds the latest stage it stands for
        distinct = {place: number for number, place in places.items()}
        return {number: f"block:{place}" for place, number in distinct.items()}
    if student.stages:
        return {number: f"stage:{number - LAST - 1}" for number in numbers if LAST - number < len(student.stages)}
    raise UserError(
        f"methods.ofa.taps: '{student.name}' has no stages or blocks to choose from; name taps, for instance "
        "{3: 'module:PATH', 4: 'module:PATH'}"
    )


def _role(stage: int, tap: str, student: ModelInfo) -> str:
    """The role of a stage's tap, which says how it is read."""
    marked = patch_role("", tap, student)
    kind, _, place = tap.partition(":")
    if prefix_length(marked):
        first = (student.block_prefix if kind == "block" else student.prefix)[0]
        return f"{CLASS if first == 'cls' else TOKENS}{stage}{marked}"
    # a map whose network holds it as tokens is read as tokens
    known = kind == "stage" and place.lstrip("-").isdigit() and abs(int(place)) <= len(student.stages)
    layout = student.stages[int(place) - (int(place) > 0)].layout if known else "NCHW"
    return f"{TOKENS if kind in ('block', 'tokens') or layout != 'NCHW' else MAP}{stage}"


def _kind(role: str) -> str:
    return next(kind for kind in (MAP, CLASS, TOKENS) if role.startswith(kind))


def _stage(role: str) -> int:
    return int(role.removeprefix(_kind(role))[0])
