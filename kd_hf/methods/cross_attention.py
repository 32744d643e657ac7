"""Pieces of ScaleKD: the cross-attention projector (CAP) and its plain stand-in, and the mimicking loss (DFM)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_hf.errors import UserError

Grid = tuple[int, int]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map ``[B, C, H, W]``."""

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C, H, W]``."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CrossAttentionProjector(nn.Module):
    """Turn a student's map into tokens of a teacher: its positions are queries, the student's are keys and values.

    With the student's map x, queries q (a learned table E, or tokens from outside) and h heads of width d::

        k = ReLU(norm(conv3x3(x))) + P         K, V = k W_k, k W_v         Q = ReLU(q W_u) W_q
        n = LayerNorm(softmax(σ Q Kᵀ / √d) V W_o)
        tokens = n + W_2 ReLU(W_1 n)

    All layers have biases; P is learned, one value per channel and position.

    Args:
        inputs: (channels, height, width) of x.
        outputs: channels of the tokens; `heads` divides it.
        grid: the teacher's height and width; tokens are in raster order.
        heads: h.
        scale: σ, a factor on the usual scale of attention.
        norm: over the batch (the paper), or over channels (the authors' variant for Swin students).
        own_queries: learn E; without it every call must bring queries.
    """

    def __init__(
        self,
        inputs: tuple[int, int, int],
        outputs: int,
        grid: Grid,
        heads: int,
        scale: float,
        norm: Literal["batch", "layer"],
        own_queries: bool,
    ) -> None:
        super().__init__()
        channels, *self.key_grid = inputs
        self.grid, self.heads, self.scale = grid, heads, scale * (outputs // heads) ** -0.5
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_norm = nn.BatchNorm2d(channels) if norm == "batch" else ChannelNorm(channels)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(inputs), std=0.02))
        self.table = nn.Parameter(torch.randn(grid[0] * grid[1], outputs)) if own_queries else None
        self.query_in = nn.Linear(outputs, outputs)
        self.query = nn.Linear(outputs, outputs)
        # two layers, as the authors have them: LAMB scales the step of each tensor by its own length
        self.key = nn.Linear(channels, outputs)
        self.value = nn.Linear(channels, outputs)
        self.out = nn.Linear(outputs, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.expand = nn.Linear(outputs, 4 * outputs)
        self.contract = nn.Linear(4 * outputs, outputs)

    def forward(self, feature: Tensor, queries: Tensor | None = None) -> Tensor:
        """``[B, C_s, H, W]`` and, without an own table, queries ``[B, M, C_t]`` → tokens ``[B, M, C_t]``."""
        seen = (F.relu(self.conv_norm(self.conv(feature))) + self.position).flatten(2).transpose(1, 2)
        key, value = self.key(seen), self.value(seen)
        if self.table is not None:
            queries = self.table[None]  # what is the same for all images is computed once
        assert queries is not None
        query = self.query(F.relu(self.query_in(queries))).expand(len(feature), -1, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)  # [B, h, M, d]
        normed = self.norm(self.out(attended.transpose(1, 2).flatten(2)))
        return normed + self.contract(F.relu(self.expand(normed)))

    def macs(self) -> int:
        """Multiply–accumulates per image."""
        height, width = self.key_grid
        keys, queries, channels = height * width, self.grid[0] * self.grid[1], self.query.out_features
        dense = [self.out, self.expand, self.contract] + ([] if self.table is not None else [self.query_in, self.query])
        per_key = sum(layer.weight.numel() for layer in (self.conv, self.key, self.value))
        per_query = sum(layer.weight.numel() for layer in dense) + 2 * keys * channels
        return keys * per_key + queries * per_query


class PointwiseProjector(nn.Module):
    """A 1×1 convolution where the widths differ, else nothing: the plain feature distillation of the paper.

    Args:
        inputs: (channels, height, width) of the student's map.
        outputs: channels of the tokens.
        grid: the teacher's height and width, which must be the student's.
    """

    def __init__(self, inputs: tuple[int, int, int], outputs: int, grid: Grid) -> None:
        super().__init__()
        if inputs[1:] != grid:
            raise UserError(
                f"methods.scalekd.projector: pointwise keeps the grid, and the student's {inputs[1]}×{inputs[2]} is "
                f"not the teacher's {grid[0]}×{grid[1]}; use projector: cross_attention"
            )
        self.grid = grid
        self.align = nn.Linear(inputs[0], outputs) if inputs[0] != outputs else nn.Identity()

    def forward(self, feature: Tensor, queries: Tensor | None = None) -> Tensor:
        """``[B, C_s, H, W] → [B, H·W, C_t]``; queries are not used."""
        return self.align(feature.flatten(2).transpose(1, 2))

    def macs(self) -> int:
        """Multiply–accumulates per image."""
        weights = self.align.weight.numel() if isinstance(self.align, nn.Linear) else 0
        return weights * self.grid[0] * self.grid[1]


def without_mean(tokens: Tensor) -> Tensor:
    """Tokens ``[B, M, C]`` less their mean over positions: what a 2-d DCT leaves when its first coefficient is 0."""
    return tokens - tokens.mean(1, keepdim=True)


def mimicking(student: Tensor, target: Tensor) -> Tensor:
    """``Σ_p ‖ŝ_p - t̂_p‖² = 2 Σ_p (1 - cos(s_p, t_p))`` over positions, per sample.

    Args:
        student: tokens ``[B, M, C]``.
        target: unit tokens ``[B, M, C]``.

    Returns:
        ``[B]``.
    """
    lengths = torch.linalg.vector_norm(student, dim=-1).clamp(min=1e-12)
    # autocast would round vecdot's cosines to bfloat16
    return 2 * (1 - (student * target).sum(-1) / lengths).sum(1)
