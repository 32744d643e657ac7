"""ViTKD: imitate a transformer's first blocks, and rebuild its last one from a part of the tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import squared_distance
from kd_hf.methods.manifold import block_taps
from kd_hf.methods.projectors import Generator, align_tokens, kernel_macs
from kd_hf.outputs import Outputs, Target

HIGH = "high"


class ViTKD(Method):
    """Two parts on patch tokens; s^l, t^l are the outputs of early blocks, s, t the final normalised tokens.

    - ``mimic = α/B Σ_b Σ_l ‖A_l s^l_b - t^l_b‖²``;
    - ``generation = β/(λ B) Σ_b Σ_{i masked} ‖G(x̃_b)_i - t_bi‖²`` with ``x = A s``. x̃ keeps ⌊M (1 - λ)⌋ of the M
      tokens of a sample and has one learnable token in place of the others; G runs over the grid of patches: a 3×3
      convolution, ReLU and a 3×3 convolution. Only the masked positions count.

    Every A is a Linear of its own where the widths differ, else nothing. Both parts are sums over tokens and
    channels, so α and β depend on the teacher's width and resolution; the defaults are the paper's, for 14×14.
    """

    name = "vitkd"
    paper = Reference(
        "ViTKD: Feature-based Knowledge Distillation for Vision Transformers",
        "https://arxiv.org/abs/2209.02432",
        "https://github.com/yzd-v/cls_KD",
    )

    class Config(MethodConfig):
        """Options of ViTKD."""

        alpha: float = Field(3e-5, ge=0)
        """Factor of the imitation of early blocks."""
        beta: float = Field(3e-6, ge=0)
        """Factor of the generation of the final tokens."""
        mask_ratio: float = Field(0.5, gt=0, lt=1)
        """λ: the share of tokens that is masked."""
        low_blocks: tuple[int, ...] = Field((0, 1), min_length=1)
        """The early blocks that are imitated, the same in both networks, counted from 0."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Early blocks and final patch tokens of two plain transformers."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        ours, theirs = (
            {**block_taps(f"{cls.name}.low_blocks", side, cfg.low_blocks, info), HIGH: "tokens:patch"}
            for side, info in (("student", student), ("teacher", teacher))
        )
        return Needs(student=ours, teacher=theirs)

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        (self.tokens, width), (theirs, channels) = student.taps[HIGH], teacher.taps[HIGH]
        self.side = math.isqrt(self.tokens)
        if self.tokens != theirs:
            raise UserError(
                f"methods.vitkd compares patch by patch; the student has {self.tokens} patch tokens and the teacher "
                f"{theirs} (choose image sizes or networks with equal grids)"
            )
        if self.side**2 != self.tokens:
            raise UserError(f"methods.vitkd: {self.tokens} patch tokens are no square grid; choose square images")
        self.kept = int(self.tokens * (1 - cfg.mask_ratio))
        self.low = [role for role in student.taps if role != HIGH]
        self.align_low = nn.ModuleList(align_tokens(width, channels) for _ in self.low)
        self.align_high = align_tokens(width, channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.generation = Generator(channels)

    def draw(self, draws: Draws) -> Mapping[str, Tensor]:
        """``noise``: a uniform number for each sample and token, ``[B, M]``; tokens with the smallest are kept."""
        return {"noise": draws.uniform("vitkd/noise", (self.tokens,))}

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"mimic": scalar, "generation": scalar}``, factors included."""
        assert teacher is not None
        mimic = [
            squared_distance(align(self._patches(student.taps[role])), self._patches(teacher.taps[role]))
            for role, align in zip(self.low, self.align_low, strict=True)
        ]
        kept = draws["noise"].argsort(dim=1, stable=True)[:, : self.kept]
        masked = torch.ones_like(draws["noise"], dtype=torch.bool).scatter(1, kept, False)[:, :, None]
        generated = self._generate(self.align_high(student.taps[HIGH]), masked)
        sides = generated, teacher.taps[HIGH]
        return {
            "mimic": self.cfg.alpha * torch.stack(mimic).sum(),
            "generation": self.cfg.beta / self.cfg.mask_ratio * squared_distance(*(side * masked for side in sides)),
        }

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of aligners and convolutions."""
        macs = kernel_macs([*self.align_low, self.align_high, *self.generation])
        return Cost(parameters=super().cost().parameters, macs=macs * self.tokens)

    def _patches(self, tokens: Tensor) -> Tensor:
        """A block's output ``[B, N, D]`` without the prefix tokens: ``[B, M, D]``."""
        return tokens[:, -self.tokens :]

    def _generate(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """G(x̃) ``[B, M, D_t]`` of the tokens ``[B, M, D_t]`` where the mask token stands at the masked ``[B, M, 1]``.

        Computing it at the masked positions alone, of the kept tokens alone, has half the products; a GPU takes a third
        longer for that than for whole convolutions.
        """
        filled = torch.where(masked, self.mask_token.to(tokens.dtype), tokens)
        # tokens of a grid lie in memory as the channels-last map that convolutions are fastest on
        maps = filled.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return self.generation(maps).permute(0, 2, 3, 1).flatten(1, 2)
