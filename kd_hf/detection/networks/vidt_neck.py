"""Between body and boxes: merging of the levels, deformable decoder layers, heads.

This file is copied into every artefact of the network and runs there without this package: it needs torch and
transformers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig
from transformers import initialization as init
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
)

from .vidt_config import ViDTConfig

GROUPS = 32
PRIOR = 0.01  # probability of a class before training


class Projection(nn.Sequential):
    """A 1×1 convolution and GroupNorm: ``[B, C, H, W] → [B, D, H, W]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1), nn.GroupNorm(GROUPS, outputs))

    def initialise(self) -> None:
        """Initial weights that transformers' rule for a layer's kind does not give."""
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                init.xavier_uniform_(layer.weight)

    def tokens(self, tokens: Tensor) -> Tensor:
        """``[B, N, C] → [B, N, D]``; the norm's statistics are over the tokens."""
        return self(tokens.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)


class Bottleneck(nn.Module):
    """A residual unit of three convolutions, each behind a ReLU."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, D, H, W] → [B, D, H, W]``."""
        out = self.conv3(self.conv2(self.conv1(maps.relu()).relu()).relu())
        return maps + out


class Merge(nn.Module):
    """One step from a coarser level to a finer one; the coarsest has nothing to take in."""

    def __init__(self, width: int, coarsest: bool) -> None:
        super().__init__()
        self.smoothing = None if coarsest else nn.Conv2d(width, width, 1)
        self.side = None if coarsest else Bottleneck(width)
        self.out = Bottleneck(width)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        """``[B, D, H, W]`` and the result of the level before → ``[B, D, H, W]``."""
        if self.smoothing is not None and self.side is not None and coarser is not None:
            larger = F.interpolate(coarser, level.shape[-2:], mode="bilinear", align_corners=True)
            level = self.smoothing(larger) + self.side(level)
        return self.out(level)


class PyramidFusion(nn.Module):
    """ViDT+'s efficient pyramid feature fusion: the levels are projected and merged from coarse to fine."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.proj = nn.ModuleList(Projection(inputs, width) for inputs in widths)
        self.merge = nn.ModuleList(Merge(width, level == len(widths) - 1) for level in range(len(widths)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse → merged maps from coarse to fine, an order that released weights rely on."""
        merged: list[Tensor] = []
        for level in reversed(range(len(maps))):
            merged.append(self.merge[level](self.proj[level](maps[level]), merged[-1] if merged else None))
        return merged


class FullPrecisionSampling(nn.Module):
    """Multi-scale sampling where a place is never rounded to half precision, which knows 1/256 of an image only.

    ``from_pretrained(…, use_kernels=True)`` puts a compiled kernel of the Hub in place of the inner module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.core = MultiScaleDeformableAttention()

    def forward(self, value: Tensor, *arguments: Any) -> Tensor:
        """Arguments of ``MultiScaleDeformableAttention``; the result is of the value's type."""
        *shapes, places, weights, step = arguments
        sampled: Tensor = self.core(value.to(places.dtype), *shapes, places, weights.to(places.dtype), step)
        return sampled.to(value.dtype)


class SampledAttention(DeformableDetrMultiscaleDeformableAttention):
    """Deformable attention over several levels; the parameters are those of Deformable DETR."""

    def __init__(self, config: DeformableDetrConfig, num_heads: int, n_points: int) -> None:
        super().__init__(config, num_heads, n_points)
        self.add_module("attn", FullPrecisionSampling())

    def initialise(self) -> None:
        """Samples start on a square around the reference, one direction for each head, equally weighted."""
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # [heads, 2]
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = (ring[:, None, None] * steps[:, None]).expand(-1, self.n_levels, -1, -1)
        init.zeros_(self.sampling_offsets.weight)
        init.copy_(self.sampling_offsets.bias, offsets.reshape(-1))
        init.zeros_(self.attention_weights.weight)
        for layer in (self.value_proj, self.output_proj):
            init.xavier_uniform_(layer.weight)


class DecoderLayer(DeformableDetrDecoderLayer):
    """Self-attention of the tokens, deformable attention to the levels, MLP; a norm behind each."""

    def __init__(self, config: ViDTConfig) -> None:
        detr = decoder_config(config)
        super().__init__(detr)
        self.encoder_attn = SampledAttention(detr, config.decoder_attention_heads, config.decoder_n_points)

    def initialise(self) -> None:
        """Initial weights that transformers' rule for a layer's kind does not give."""
        attention = (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj, self.self_attn.o_proj)
        for layer in (*attention, self.mlp.fc1, self.mlp.fc2):
            init.xavier_uniform_(layer.weight)


def decoder_config(config: ViDTConfig) -> DeformableDetrConfig:
    """How transformers' decoder layer is told the same."""
    backend: dict[str, Any] = {"attn_implementation": "sdpa"}
    return DeformableDetrConfig(
        d_model=config.d_model,
        num_feature_levels=len(config.level_widths),
        decoder_attention_heads=config.decoder_attention_heads,
        decoder_ffn_dim=config.decoder_ffn_dim,
        decoder_n_points=config.decoder_n_points,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        activation_dropout=config.dropout,
        **backend,
    )


class ClassHead(nn.Linear):
    """Logits of classes, each rare at the start."""

    def initialise(self) -> None:
        """Initial weights that transformers' rule for a layer's kind does not give."""
        init.constant_(self.bias, -math.log(1 / PRIOR - 1))


class MlpHead(nn.Module):
    """Three layers with ReLU whose output starts at `start`, or anywhere."""

    def __init__(self, width: int, outputs: int, start: Sequence[float] | None = None) -> None:
        super().__init__()
        self.start = start
        self.layers = nn.ModuleList(nn.Linear(width, size) for size in (width, width, outputs))

    def initialise(self) -> None:
        """Initial weights that transformers' rule for a layer's kind does not give."""
        layers = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in layers:
            init.xavier_uniform_(layer.weight)
        if self.start is not None:
            init.zeros_(layers[-1].weight)
            init.copy_(layers[-1].bias, torch.tensor(self.start))

    def forward(self, tokens: Tensor) -> Tensor:
        """``[…, D] → […, outputs]``."""
        *hidden, last = self.layers
        for layer in hidden:
            tokens = layer(tokens).relu()
        return last(tokens)


class TokenClassifier(nn.Module):
    """Logits of every token of the memory; those within 1 % of an image's edge, or outside, count as zeros."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.token_embed = ClassHead(width, num_classes)

    def forward(self, maps: Sequence[Tensor], valid: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps ``[B, D, H, W]`` and masks ``[B, H, W]`` → logits ``[B, H, W, K]`` of each level."""
        logits = []
        for level, mask in zip(maps, valid, strict=True):
            inside = mask
            for axis in (1, 2):
                shape = [1, 1, 1]
                shape[axis] = -1
                place = torch.arange(mask.shape[axis], device=mask.device, dtype=torch.float32).view(shape) + 0.5
                place = place / mask.narrow(3 - axis, 0, 1).sum(axis, keepdim=True)
                inside = inside & (place > 0.01) & (place < 0.99)
            tokens = level.permute(0, 2, 3, 1) * inside[..., None]
            logits.append(self.token_embed(self.enc_output_norm(self.enc_output(tokens))))
        return tuple(logits)
