"""ViTKD: imitate a transformer's first blocks, and rebuild its last one from a part of the tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_hf.data.draws import Draws
from kd_hf.errors import UserError
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Outputs, Reference, Target, require_teacher
from kd_hf.methods.losses import squared_distance
from kd_hf.methods.manifold import block_taps
from kd_hf.methods.projectors import Generator, align_tokens, kernel_macs
from kd_hf.models.info import ModelInfo, Shapes

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
        order = draws["noise"].argsort(dim=1, stable=True)
        kept, masked = order.split((self.kept, self.tokens - self.kept), dim=1)
        generated = self._generate(self.align_high(student.taps[HIGH]), kept, masked)
        wanted = _pick(teacher.taps[HIGH], masked)
        return {
            "mimic": self.cfg.alpha * torch.stack(mimic).sum(),
            "generation": self.cfg.beta / self.cfg.mask_ratio * squared_distance(generated, wanted),
        }

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of aligners and convolutions."""
        channels = self.mask_token.shape[2]
        # a kept token goes through one convolution and a masked one through the other; 9 C for the map of the masked
        macs = kernel_macs([*self.align_low, self.align_high]) + 9 * channels * (channels + 1)
        return Cost(parameters=super().cost().parameters, macs=macs * self.tokens)

    def _patches(self, tokens: Tensor) -> Tensor:
        """A block's output ``[B, N, D]`` without the prefix tokens: ``[B, M, D]``."""
        return tokens[:, -self.tokens :]

    def _generate(self, tokens: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """G(x̃) ``[B, n, D_t]`` at the masked positions ``[B, n]`` of the tokens ``[B, M, D_t]``.

        A convolution is ``y_i = b + Σ_o W_o x_{i+o}`` over nine offsets o. So the y_i at masked i alone are one product
        of their neighbours, and tokens x_j at kept j alone are one product whose nine parts are added to y_{j-o}.
        """
        first, first_bias, second, second_bias = self.generation.parameters()
        kernels = first.permute(2, 3, 0, 1).flatten(0, 2)  # [9 D_t, D_t]: the W_o, one below the other
        hidden = self._spread(tokens, kept, kernels) + self._fill(kept, kernels, first_bias)  # [B, √M, √M, D_t]
        bordered = F.pad(F.relu(hidden, inplace=True), (0, 0, 1, 1, 1, 1)).flatten(0, 2)  # [B (√M + 2)², D_t]
        # an embedding has a fast gradient, unlike indexing
        near = F.embedding(self._neighbours(masked), bordered)  # [B, n, 9, D_t]
        return F.linear(near.flatten(2), second.permute(0, 2, 3, 1).flatten(1), second_bias)

    def _spread(self, tokens: Tensor, kept: Tensor, kernels: Tensor) -> Tensor:
        """The convolution ``[B, √M, √M, D_t]``, without bias, of the kept tokens and zeros."""
        batch, side = len(tokens), self.side + 2
        parts = F.linear(_pick(tokens, kept), kernels).view(-1, tokens.shape[2])
        receivers = self._neighbours(kept).flip(2).flatten()  # the neighbour at offset -o is given W_o x_j
        cells = parts.new_zeros(batch * side**2, parts.shape[1]).index_add(0, receivers, parts)
        return cells.view(batch, side, side, -1)[:, 1:-1, 1:-1]

    def _fill(self, kept: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
        """The convolution ``[B, √M, √M, D_t]`` of mask tokens m and zeros: Σ_o W_o m over a map of one channel."""
        shape = len(kept), 1, self.side, self.side
        masked = kernels.new_ones(len(kept), self.tokens).scatter(1, kept, 0.0).view(shape)
        of_token = F.linear(self.mask_token[0], kernels).view(3, 3, -1).permute(2, 0, 1)  # [D_t, 3, 3]
        return F.conv2d(masked, of_token[:, None], bias, padding=1).permute(0, 2, 3, 1)

    def _neighbours(self, positions: Tensor) -> Tensor:
        """Rows ``[B, n, 9]`` of the 3×3 neighbours of positions ``[B, n]`` among all cells of bordered grids."""
        side, three = self.side + 2, torch.arange(3, device=positions.device)
        image = side**2 * torch.arange(len(positions), device=positions.device)
        corner = image[:, None] + positions + 2 * (positions // self.side)
        return corner[:, :, None] + (side * three[:, None] + three).flatten()


def _pick(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens ``[B, n, D]`` at positions ``[B, n]`` of ``[B, M, D]``."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[2]))
