"""Checkpoints as the authors' code lays them out, made from our networks by turning names into theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_hf.models.handle import ModelHandle
from kd_hf.models.load import load_model
from tests.models.families import SWIN, VIT

State = dict[str, Tensor]
# our network's name → theirs, below `backbone.`
VIT_NAMES = [
    (r"patch_embed\.proj", "patch_embed.projection"),
    (r"blocks\.(\d+)\.norm([12])", r"layers.\1.ln\2"),
    (r"blocks\.(\d+)\.attn", r"layers.\1.attn"),
    (r"blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
    (r"blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
    (r"norm", "ln1"),
    (r"fc_norm", "ln2"),
]
DEIT3_NAMES = [
    (r"blocks\.(\d+)\.ls1\.gamma", r"layers.\1.attn.gamma1.weight"),
    (r"blocks\.(\d+)\.ls2\.gamma", r"layers.\1.ffn.gamma2.weight"),
    *VIT_NAMES,
]
DEIT3_OLD_NAMES = [(r"blocks\.(\d+)\.ls([12])\.gamma", r"layers.\1.gamma_\2"), *VIT_NAMES]
V1D_NAMES = [
    (r"conv1\.0", "stem.0.conv"),
    (r"conv1\.1", "stem.0.bn"),
    (r"conv1\.3", "stem.1.conv"),
    (r"conv1\.4", "stem.1.bn"),
    (r"conv1\.6", "stem.2.conv"),
    (r"bn1", "stem.2.bn"),
    (r"layer1\.0\.downsample\.1", "layer1.0.downsample.0"),
    (r"layer1\.0\.downsample\.2", "layer1.0.downsample.1"),
]
REGNET_NAMES = [
    (r"stem\.conv", "conv1"),
    (r"stem\.bn", "bn1"),
    *(
        (rf"s(\d)\.b{block}\.{ours}", rf"layer\1.{block - 1}.{theirs}")
        for block in range(1, 10)
        for ours, theirs in (
            (r"conv(\d)\.conv", r"conv\2"),
            (r"conv(\d)\.bn", r"bn\2"),
            (r"downsample\.conv", "downsample.0"),
            (r"downsample\.bn", "downsample.1"),
        )
    ),
]
MOBILENET_V2_NAMES = [
    ("conv_stem", "conv1.conv"),
    ("bn1", "conv1.bn"),
    ("conv_head", "conv2.conv"),
    ("bn2", "conv2.bn"),
    (r"blocks\.0\.0\.conv_dw", "layer1.0.conv.0.conv"),
    (r"blocks\.0\.0\.bn1", "layer1.0.conv.0.bn"),
    (r"blocks\.0\.0\.conv_pw", "layer1.0.conv.1.conv"),
    (r"blocks\.0\.0\.bn2", "layer1.0.conv.1.bn"),
    *(
        (rf"blocks\.{stage}\.(\d)\.{ours}", rf"layer{stage + 1}.\1.conv.{theirs}")
        for stage in range(1, 7)
        for ours, theirs in (
            ("conv_pwl", "2.conv"),
            ("conv_pw", "0.conv"),
            ("conv_dw", "1.conv"),
            ("bn1", "0.bn"),
            ("bn2", "1.bn"),
            ("bn3", "2.bn"),
        )
    ),
]
SWIN_NAMES = [
    (r"patch_embed\.proj", "patch_embed.projection"),
    *(
        (rf"layers\.{level}\.{ours}", rf"stages.{at}.{theirs}")
        for level in range(4)
        for at, ours, theirs in (
            (level, r"blocks\.(\d+)\.attn", r"blocks.\1.attn.w_msa"),
            (level, r"blocks\.(\d+)\.mlp\.fc1", r"blocks.\1.ffn.layers.0.0"),
            (level, r"blocks\.(\d+)\.mlp\.fc2", r"blocks.\1.ffn.layers.1"),
            (level, r"blocks\.(\d+)\.norm", r"blocks.\1.norm"),
            (level - 1, "downsample", "downsample"),
        )
    ),
    ("norm", "norm3"),
]
CONVNEXT_NAMES = [
    (r"stem\.", "downsample_layers.0."),
    (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
    (r"stages\.(\d)\.blocks\.(\d)\.conv_dw", r"stages.\1.\2.depthwise_conv"),
    (r"stages\.(\d)\.blocks\.(\d)\.mlp\.fc", r"stages.\1.\2.pointwise_conv"),
    (r"stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2"),
    ("norm_pre", "norm3"),
]
MIXER_NAMES = [
    (r"stem\.proj", "patch_embed.projection"),
    (r"blocks\.(\d+)\.norm([12])", r"layers.\1.ln\2"),
    (r"blocks\.(\d+)\.mlp_(token|channel)s\.fc1", r"layers.\1.\2_mix.layers.0.0"),
    (r"blocks\.(\d+)\.mlp_(token|channel)s\.fc2", r"layers.\1.\2_mix.layers.1"),
    ("norm", "ln1"),
]
# convolution and norm of a branch follow one another in torchvision's numbers, with a ReLU behind some norms
SHUFFLENET_V2_NAMES = [
    *(
        (rf"{ours}\.{number}", f"{theirs}.{part}")
        for ours, theirs in (("conv1", "conv1"), ("conv5", "layers.3"))
        for number, part in enumerate(("conv", "bn"))
    ),
    *(
        (rf"stage{stage}\.(\d)\.{branch}\.{number}", rf"layers.{stage - 2}.\1.{branch}.{pair}.{part}")
        for stage in (2, 3, 4)
        for branch, convolutions in (("branch1", (0, 2)), ("branch2", (0, 3, 5)))
        for pair, first in enumerate(convolutions)
        for number, part in ((first, "conv"), (first + 1, "bn"))
    ),
]


def mobilenet_v1_names(unit_names):
    """The blocks in the order in which timm runs them, under the given names; the stem is the first of these."""
    blocks = [(stage, block) for stage, count in enumerate((1, 2, 2, 6, 2)) for block in range(count)]
    stem, *units = unit_names
    names = [("conv_stem", f"{stem}.0"), ("bn1", f"{stem}.1")]
    for (stage, block), unit in zip(blocks, units, strict=True):
        names += [
            (rf"blocks\.{stage}\.{block}\.{ours}", f"{unit}.{theirs}")
            for ours, theirs in (("conv_dw", 0), ("bn1", 1), ("conv_pw", 3), ("bn2", 4))
        ]
    return names


MOBILENET_V1_CLS_KD = mobilenet_v1_names([*(f"model.{unit}" for unit in range(12)), "s4.0", "s4.1"])
MOBILENET_V1_SCALEKD = mobilenet_v1_names(
    [f"s{stage}.{unit}" for stage, count in enumerate((4, 4, 4, 2), 1) for unit in range(count)]
)


def as_is(state: State) -> State:
    return state


def unfold_order(channels: int) -> Tensor:
    """Where in timm's merged pixels each of OpenMMLab's is, found by merging pixels that are all different."""
    pixels = torch.arange(4.0 * channels).view(1, channels, 2, 2)
    theirs = F.unfold(pixels, 2, stride=2).flatten()
    square = pixels.permute(0, 2, 3, 1)
    corners = (square[:, 0, 0], square[:, 1, 0], square[:, 0, 1], square[:, 1, 1])
    timms = torch.cat(corners, -1).flatten()
    return (theirs[:, None] == timms).nonzero()[:, 1]


def swin_extras(state: State) -> State:
    """Patch merging in OpenMMLab's order, and what its networks have beyond timm's."""
    for name in [name for name in state if ".downsample." in name]:
        state[name] = state[name][..., unfold_order(state[name].shape[-1] // 4)]
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.int64)
    return state | {f"backbone.norm{stage}.weight": torch.ones(4) for stage in range(3)}


def unused_class_token(state: State) -> State:
    """A network that averages patches still has the token, and its position in front."""
    positions = state["backbone.pos_embed"]
    first = torch.full_like(positions[:, :1], 7.0)
    return state | {"backbone.cls_token": first.clone(), "backbone.pos_embed": torch.cat((first, positions), 1)}


@dataclass(frozen=True)
class Official:
    """A network and how OpenMMLab names its weights."""

    arch: str
    names: list[tuple[str, str]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    head: str = "head.fc"
    extras: Callable[[State], State] = as_is


DEIT_HEAD = "head.layers.head"
SHUFFLENET = {"depths": [2, 3, 1], "widths": [8, 12, 16, 20, 24]}
CONVNEXT = {"head_norm_first": True, "depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
OFFICIAL = {
    "deit": Official("deit_tiny_patch16_224", VIT_NAMES, VIT, head=DEIT_HEAD),
    "deit-two-heads": Official("deit_tiny_distilled_patch16_224", VIT_NAMES, VIT, head=DEIT_HEAD),
    "deit3": Official("deit3_small_patch16_224", DEIT3_NAMES, VIT, head=DEIT_HEAD),
    "deit3-0.x": Official("deit3_small_patch16_224", DEIT3_OLD_NAMES, VIT, head=DEIT_HEAD),
    "vit-gap": Official("kd_hf/vit_small_patch16_gap", VIT_NAMES, VIT, extras=unused_class_token),
    "vit-gap-14": Official("kd_hf/vit_base_patch14_gap", VIT_NAMES, VIT, 28, extras=unused_class_token),
    "eva": Official("eva_large_patch14_196", VIT_NAMES, VIT, 28),
    "resnet": Official("resnet18", []),
    "resnet-cifar": Official("kd_hf/resnet18_cifar", []),
    "resnet-v1d": Official("resnet26d", V1D_NAMES),
    "regnet": Official("regnetx_002", REGNET_NAMES),
    "mobilenet-v1": Official("kd_hf/mobilenetv1_relu", MOBILENET_V1_CLS_KD),
    "mobilenet-v1-scalekd": Official("kd_hf/mobilenetv1_relu", MOBILENET_V1_SCALEKD),
    "mobilenet-v2": Official("mobilenetv2_050", MOBILENET_V2_NAMES),
    "shufflenet-v2": Official("kd_hf/shufflenetv2_x1", SHUFFLENET_V2_NAMES, SHUFFLENET, 64),
    "swin": Official("swin_tiny_patch4_window7_224", SWIN_NAMES, SWIN, 64, extras=swin_extras),
    "convnext": Official("convnext_tiny", CONVNEXT_NAMES, CONVNEXT, 64),
    "mixer": Official("kd_hf/mixer_b14", MIXER_NAMES, {"embed_dim": 16, "depth": 2}, 28),
}


def build(one: Official, classes: int = 5) -> ModelHandle:
    """The network with weights and statistics that are not its initial ones."""
    handle = load_model(one.arch, num_classes=classes, image_size=one.size, kwargs=one.kwargs)
    randomise(handle.network)
    return handle


def randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(len(list(network.parameters())))
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)


def official_state(one: Official, handle: ModelHandle) -> State:
    """The weights as OpenMMLab's classifier has them."""
    heads = {handle.info.head: one.head, handle.info.dist_head: "head.layers.head_dist"}
    state = {_their_name(name, one, heads): value for name, value in handle.network.state_dict().items()}
    return one.extras(state)


def _their_name(name, one, heads):
    module, _, kind = name.rpartition(".")
    if module in heads:
        return f"{heads[module]}.{kind}"
    for ours, theirs in one.names:
        if match := re.match(ours, name):
            return f"backbone.{match.expand(theirs)}{name[match.end() :]}"
    return f"backbone.{name}"


def logits_of(network: nn.Module, size: int) -> Tensor:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network.eval()(pixels)
