"""ViDT's weights as its authors name and shape them, and values for them that depend on nothing but the name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.goldens.numbers import uniform


@dataclass(frozen=True)
class Sizes:
    """The arguments of the authors' command line that decide shapes, and the options."""

    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    patch_size: int = 4
    mlp_ratio: float = 4
    det_token_num: int = 100
    d_model: int = 256
    dec_layers: int = 6
    nheads: int = 8
    dim_feedforward: int = 1024
    dec_n_points: int = 4
    num_feature_levels: int = 4
    num_classes: int = 91
    with_box_refine: bool = True
    epff: bool = False
    iou_aware: bool = False
    token_label: bool = False
    n_keep: int = 0


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs, *kernel)
    yield f"{name}.bias", (outputs,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def mlp(name: str, width: int, outputs: int) -> Shapes:
    for number, size in enumerate((width, width, outputs)):
        yield from linear(f"{name}.layers.{number}", width, size)


def body(sizes: Sizes) -> Shapes:
    widths = [sizes.embed_dim * 2**stage for stage in range(len(sizes.depths))]
    yield "backbone.det_token", (1, sizes.det_token_num, widths[0])
    yield "backbone.det_pos_embed", (1, sizes.det_token_num, sizes.d_model)
    yield from linear("backbone.patch_embed.proj", 3, widths[0], sizes.patch_size, sizes.patch_size)
    yield from norm("backbone.patch_embed.norm", widths[0])
    for stage, width in enumerate(widths):
        here = f"backbone.layers.{stage}"
        for block in range(sizes.depths[stage]):
            name = f"{here}.blocks.{block}"
            yield from norm(f"{name}.norm1", width)
            yield (
                f"{name}.attn.relative_position_bias_table",
                ((2 * sizes.window_size - 1) ** 2, sizes.num_heads[stage]),
            )
            yield from linear(f"{name}.attn.qkv", width, 3 * width)
            yield from linear(f"{name}.attn.proj", width, width)
            yield from norm(f"{name}.norm2", width)
            yield from linear(f"{name}.mlp.fc1", width, int(width * sizes.mlp_ratio))
            yield from linear(f"{name}.mlp.fc2", int(width * sizes.mlp_ratio), width)
            yield from linear(f"{name}.det_pos_linear", sizes.d_model, width)
        merged = 2 * width if stage + 1 < len(widths) else sizes.d_model
        yield f"{here}.downsample.reduction.weight", (merged, 4 * width)
        yield f"{here}.downsample.expansion.weight", (merged, width)
        yield from norm(f"{here}.downsample.norm", 4 * width)
        yield from norm(f"{here}.downsample.norm2", width)
        if stage:
            yield from norm(f"backbone.norm{stage}", width)


def neck(sizes: Sizes) -> Shapes:
    width, heads = sizes.d_model, sizes.nheads * sizes.num_feature_levels * sizes.dec_n_points
    yield "transformer.level_embed", (sizes.num_feature_levels, width)
    yield from linear("transformer.reference_points", width, 2)
    for layer in range(sizes.dec_layers):
        name = f"transformer.decoder.layers.{layer}"
        yield from linear(f"{name}.cross_attn.sampling_offsets", width, 2 * heads)
        yield from linear(f"{name}.cross_attn.attention_weights", width, heads)
        yield from linear(f"{name}.cross_attn.value_proj", width, width)
        yield from linear(f"{name}.cross_attn.output_proj", width, width)
        yield f"{name}.self_attn.in_proj_weight", (3 * width, width)
        yield f"{name}.self_attn.in_proj_bias", (3 * width,)
        yield from linear(f"{name}.self_attn.out_proj", width, width)
        yield from linear(f"{name}.linear1", width, sizes.dim_feedforward)
        yield from linear(f"{name}.linear2", sizes.dim_feedforward, width)
        for number in (1, 2, 3):
            yield from norm(f"{name}.norm{number}", width)
    if sizes.token_label:
        yield from linear("transformer.enc_output", width, width)
        yield from norm("transformer.enc_output_norm", width)
        yield from linear("transformer.token_embed", width, sizes.num_classes)


def fusion(widths: list[int], width: int) -> Shapes:
    for level, inputs in enumerate(widths):
        yield from linear(f"fusion.multi_scaler.layer_{level}_rn", inputs, width, 1, 1)
        yield from norm(f"fusion.multi_scaler.p_norm_{level}", width)
        name = f"fusion.multi_scaler.refinenet_{level}"
        yield from linear(f"{name}.smoothing", width, width, 1, 1)
        for unit in (1, 2):
            yield from linear(f"{name}.resConfUnit{unit}.conv1", width, 64, 1, 1)
            yield from linear(f"{name}.resConfUnit{unit}.conv2", 64, 64, 3, 3)
            yield from linear(f"{name}.resConfUnit{unit}.conv3", 64, width, 1, 1)


def shapes(sizes: Sizes) -> Shapes:
    """Every floating-point entry of the authors' state dict."""
    width = sizes.d_model
    widths = [sizes.embed_dim * 2 ** (stage + 1) for stage in range(len(sizes.depths) - 1)] + [width]
    yield from body(sizes)
    if sizes.epff:
        yield from fusion(widths, width)
    else:
        for level, inputs in enumerate(widths):
            yield from linear(f"input_proj.{level}.0", inputs, width, 1, 1)
            yield from norm(f"input_proj.{level}.1", width)
    for name, inputs in (("tgt_proj", widths[-2]), ("query_pos_proj", width)):
        yield from linear(f"{name}.0", inputs, width, 1, 1)
        yield from norm(f"{name}.1", width)
    yield from neck(sizes)
    for stage in range(sizes.dec_layers + 1):
        yield from linear(f"class_embed.{stage}", width, sizes.num_classes)
        yield from mlp(f"bbox_embed.{stage}", width, 4)
        if sizes.with_box_refine:
            yield from mlp(f"transformer.decoder.bbox_embed.{stage}", width, 4)
        if sizes.iou_aware:
            yield from mlp(f"iou_embed.{stage}", width, 1)
        if sizes.n_keep:
            yield from mlp(f"vector_embed.{stage}", width, sizes.n_keep)


def source_name(name: str, refine: bool) -> str:
    """The name whose values an entry has: aliases and shared modules have those of one."""
    name = name.removeprefix("transformer.decoder.") if name.startswith("transformer.decoder.bbox_embed.") else name
    kind, _, rest = name.partition(".")
    if kind == "vector_embed" or (not refine and kind in ("class_embed", "bbox_embed", "iou_embed")):
        return f"{kind}.0.{rest.partition('.')[2]}"
    return name


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers from a name: CRC-32 of it and SplitMix64 of the flat index, scaled as suits the kind of weight."""
    v = uniform(name, shape)
    last = name.rpartition(".")[2]
    if last in {"det_token", "det_pos_embed", "relative_position_bias_table", "level_embed"}:
        return v
    if name.endswith("sampling_offsets.bias"):
        return 2 * v
    if len(shape) == 1:
        return 1 + 0.2 * v if last == "weight" else 0.1 * v
    return v * (3 / np.prod(shape[1:])) ** 0.5


def state_dict(sizes: Sizes) -> dict[str, Tensor]:
    """The authors' state dict, with their integer buffers, in float64."""
    state = {name: value(source_name(name, sizes.with_box_refine), shape) for name, shape in shapes(sizes)}
    for stage, depth in enumerate(sizes.depths):
        for block in range(depth):
            name = f"backbone.layers.{stage}.blocks.{block}.attn.relative_position_index"
            state[name] = torch.zeros(sizes.window_size**2, sizes.window_size**2, dtype=torch.int64)
    return state
