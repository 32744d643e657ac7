"""The body of ViDT: a Swin transformer whose attention also carries [DET] tokens (reconfigured attention module).

This file is copied into every artefact of the network and runs there without this package: it needs torch and
transformers only. Parameter names are those of the authors' code.

Hwanjun Song et al.: ViDT: An Efficient and Effective Fully Transformer-based Object Detector (ICLR 2022), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .vidt_config import ViDTConfig

MASKED = -100.0  # added to a logit, as in Swin


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A bool mask ``[B, H, W]`` at another size, by the nearest pixel."""
    return mask if mask.shape[1:] == tuple(size) else F.interpolate(mask[None].float(), size=tuple(size))[0].bool()


def sine_positions(padding: Tensor, width: int) -> Tensor:
    """Sines of each valid pixel's relative row and column: ``[B, H, W] → [B, H, W, width]``, float32.

    Rows and columns are counted from 1 over valid pixels and end at 2π.
    """
    features = width // 2
    steps = torch.arange(features, dtype=torch.float32, device=padding.device)
    periods = 10000 ** (2 * (steps // 2) / features)
    halves = []
    for axis in (1, 2):
        counted = (~padding).cumsum(axis, dtype=torch.float32)
        last = counted.narrow(axis, counted.shape[axis] - 1, 1)
        angles = (counted / (last + 1e-6) * (2 * math.pi))[..., None] / periods
        halves.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2))
    return torch.cat(halves, -1)


def to_windows(tokens: Tensor, side: int) -> Tensor:
    """``[B, H, W, C] → [B, N, side², C]`` for H and W that are multiples of `side`."""
    return tokens.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(windows: Tensor, height: int, side: int) -> Tensor:
    """The inverse of :func:`to_windows` for maps of that height."""
    rows = windows.unflatten(1, (height // side, -1)).unflatten(3, (side, side))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_index(side: int, device: torch.device) -> Tensor:
    """For each pair of tokens of a window, the row of the bias table: ``[side², side²]``."""
    place = torch.arange(side, device=device)
    difference = place[:, None] - place + side - 1
    return (difference[:, None, :, None] * (2 * side - 1) + difference[None, :, None, :]).flatten(2).flatten(0, 1)


def region_mask(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """What to add so that shifted windows do not attend across the map's edge: ``[N, side², side²]``."""
    shift = side // 2

    def regions(size: int) -> Tensor:
        place = torch.arange(size, device=device)
        return (place >= size - side).long() + (place >= size - shift).long()

    numbers = regions(height)[:, None] * 3 + regions(width)
    windows = to_windows(numbers[None, ..., None], side)[0, ..., 0]  # [N, side²]
    return torch.where(windows[:, None] != windows[:, :, None], MASKED, 0.0)


@dataclass(frozen=True)
class StageInputs:
    """What all blocks of a stage share."""

    det_positions: Tensor  # [1, Q, D]
    index: Tensor  # [side², side²]
    regions: Tensor  # [N, side², side²]
    patch_positions: Tensor | None = None  # [B, H·W, C], where the [DET] tokens read the image
    padding: Tensor | None = None  # [B, 1, 1, H·W + Q], added to those logits


class RamAttention(nn.Module):
    """Attention of patches within windows, and of [DET] tokens among themselves or over the image as well.

    Both use the same weights; patches never attend to [DET] tokens.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def initialise(self) -> None:
        """Initial weights that transformers' rule for a layer's kind does not give."""
        init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def attend_windows(self, windows: Tensor, index: Tensor, regions: Tensor | None) -> Tensor:
        """``[B, N, S, C] → [B, N, S, C]``; `regions` ``[N, S, S]`` are added to the logits."""
        batch, count, size, _ = windows.shape
        bias = self.relative_position_bias_table[index].movedim(-1, 0)  # [heads, S, S]
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        if regions is None:
            qkv = qkv.flatten(1, 2)  # [3, B·N, heads, S, d]
            mask = bias[None]
        else:
            qkv = qkv.flatten(2, 3)  # [3, B, N·heads, S, d]
            mask = (bias + regions[:, None].to(bias.dtype)).flatten(0, 1)[None]
        query, key, value = qkv.unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype))
        return self.proj(out.reshape(batch, count, self.heads, size, -1).transpose(2, 3).reshape(windows.shape))

    def attend_tokens(self, tokens: Tensor, image: Tensor | None, padding: Tensor | None) -> Tensor:
        """``[b, Q, C] → [b, Q, C]``: over the tokens, behind the image's patches ``[B, N, C]`` if given."""
        query, key, value = self.qkv(tokens).chunk(3, -1)
        if image is not None:
            width = tokens.shape[-1]
            pair = F.linear(image, self.qkv.weight[width:], self.qkv.bias[width:])
            key, value = torch.cat([pair, torch.cat([key, value], -1)], 1).chunk(2, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mask = None if padding is None else padding.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class BodyMlp(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[…, C] → […, C]``."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class RamBlock(GradientCheckpointingLayer):
    """A block of Swin over patches and [DET] tokens; `shift` moves the windows by half their side."""

    def __init__(self, config: ViDTConfig, width: int, heads: int, shift: bool, drop_path: float) -> None:
        super().__init__()
        self.side = config.window_size
        self.shift = self.side // 2 if shift else 0
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = RamAttention(width, heads, self.side)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = BodyMlp(width, int(width * config.mlp_ratio))
        self.det_pos_linear = nn.Linear(config.d_model, width)

    def forward(self, patches: Tensor, det: Tensor, stage: StageInputs) -> tuple[Tensor, Tensor]:
        """``[B, H, W, C]`` and ``[b, Q, C]`` → the same; b is B, or 1 while the tokens have not seen the image."""
        normed = self.norm1(patches)
        tokens = self.norm1(det) + self.det_pos_linear(stage.det_positions)
        image = None
        if stage.patch_positions is not None:
            image = normed.flatten(1, 2) + stage.patch_positions.to(normed.dtype)
        keep = self._keep(patches)
        patches = _add(patches, self._attend_shifted(normed, stage), keep)
        det = _add(det, self.attn.attend_tokens(tokens, image, stage.padding), keep)
        keep = self._keep(patches)
        patches, det = (_add(part, self.mlp(self.norm2(part)), keep) for part in (patches, det))
        return patches, det

    def _attend_shifted(self, patches: Tensor, stage: StageInputs) -> Tensor:
        """Windows that reach over the lower and right edge see zeros there, as in the authors' code."""
        height, width = patches.shape[1:3]
        padded = F.pad(patches, (0, 0, 0, -width % self.side, 0, -height % self.side))
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), (1, 2))
        windows = to_windows(padded, self.side)
        windows = self.attn.attend_windows(windows, stage.index, stage.regions if self.shift else None)
        out = from_windows(windows, padded.shape[1], self.side)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return out[:, :height, :width]

    def _keep(self, patches: Tensor) -> Tensor | None:
        """Stochastic depth: the factor ``[B]`` of a branch, the same for a sample's patches and tokens."""
        if not self.training or self.drop_path == 0:
            return None
        return patches.new_empty(len(patches)).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)


def _add(tensor: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    return tensor + (branch if keep is None else branch * keep.view(-1, *[1] * (branch.ndim - 1)))


class PatchMerging(nn.Module):
    """Half the resolution: four patches become one. A [DET] token takes the place of all four."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, outputs, bias=False)

    def forward(self, patches: Tensor, det: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, W, C]`` and ``[b, Q, C]`` → ``[B, ⌈H/2⌉, ⌈W/2⌉, C']`` and ``[b, Q, C']``."""
        height, width = patches.shape[1:3]
        padded = F.pad(patches, (0, 0, 0, width % 2, 0, height % 2))
        squares = torch.cat([padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(squares)), self.reduction(self.norm(det.repeat(1, 1, 4)))


class Stage(nn.Module):
    """Blocks of one width, and the merging behind them."""

    def __init__(self, config: ViDTConfig, number: int) -> None:
        super().__init__()
        width, before = config.stage_widths[number], sum(config.depths[:number])
        last = max(1, sum(config.depths) - 1)
        self.blocks = nn.ModuleList(
            RamBlock(
                config,
                width,
                config.num_heads[number],
                shift=block % 2 == 1,
                drop_path=config.drop_path_rate * (before + block) / last,
            )
            for block in range(config.depths[number])
        )
        self.downsample = PatchMerging(width, [*config.stage_widths, config.d_model][number + 1])

    def forward(self, patches: Tensor, det: Tensor, inputs: StageInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patches and [DET] tokens behind the blocks, and both merged."""
        for block in self.blocks:
            patches, det = block(patches, det, inputs)
        return patches, det, *self.downsample(patches, det)


class PatchEmbed(nn.Module):
    """Non-overlapping patches; images are filled up with zeros below and on the right."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(3, width, side, side)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, ⌈H/side⌉, ⌈W/side⌉, C]``."""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % self.side, 0, -height % self.side))
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))


class RamSwin(nn.Module):
    """Swin with [DET] tokens: maps at several resolutions and what the tokens found."""

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__()
        self.side = config.window_size
        self.cross_stages = frozenset(config.cross_stages)
        # the padding mask first goes to this fraction of the first stage's resolution
        self.mask_divisor = 2 ** (len(config.depths) - len(config.cross_stages))
        self.drop_path_rate = config.drop_path_rate
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        self.det_token = nn.Parameter(torch.zeros(1, config.num_queries, config.embed_dim))
        self.det_pos_embed = nn.Parameter(torch.zeros(1, config.num_queries, config.d_model))
        self.layers = nn.ModuleList(Stage(config, number) for number in range(len(config.depths)))

    def initialise(self) -> None:
        """Initial weights that transformers' rule for a layer's kind does not give."""
        init.trunc_normal_(self.det_token, std=0.02)
        init.trunc_normal_(self.det_pos_embed, std=0.02)

    def forward(self, pixels: Tensor, padding: Tensor) -> tuple[list[Tensor], Tensor]:
        """Read images.

        Args:
            pixels: ``[B, 3, H, W]``.
            padding: bool ``[B, H, W]``, True where a pixel is not of the image.

        Returns:
            The maps ``[B, C, h, w]``, of stage 2 and on before their merging and the last merged (strides 8 to 64),
            and the tokens ``[B, Q, 8C]`` of the last stage.
        """
        patches = self.patch_embed(pixels)
        height, width = patches.shape[1:3]
        divisor = self.mask_divisor
        padding = resize_mask(padding, (max(1, height // divisor), max(1, width // divisor)))
        index = relative_index(self.side, pixels.device)
        # until they read the image the tokens are the same for all of them, unless a sample skips branches of its own
        det = self.det_token.expand(len(pixels) if self.training and self.drop_path_rate > 0 else 1, -1, -1)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.layers):
            inputs = self._stage_inputs(patches, padding, index, number)
            det = det.expand(len(pixels), -1, -1) if number in self.cross_stages else det
            features, tokens, patches, det = stage(patches, det, inputs)
            if number > 0:
                maps.append(features.permute(0, 3, 1, 2))
        maps.append(patches.permute(0, 3, 1, 2))
        return maps, tokens.expand(len(pixels), -1, -1)

    def _stage_inputs(self, patches: Tensor, padding: Tensor, index: Tensor, number: int) -> StageInputs:
        height, width, channels = patches.shape[1:]
        regions = region_mask(height + -height % self.side, width + -width % self.side, self.side, patches.device)
        if number not in self.cross_stages:
            return StageInputs(self.det_pos_embed, index, regions)
        padding = resize_mask(padding, (height, width))
        added = F.pad(padding.flatten(1).to(patches.dtype) * MASKED, (0, self.det_token.shape[1]))[:, None, None]
        positions = sine_positions(padding, channels).flatten(1, 2)
        return StageInputs(self.det_pos_embed, index, regions, positions, added)
