"""Weights of OpenMMLab classifiers (mmcls 0.x and 1.0, as cls_KD and ScaleKD release them) by timm's names.

The names of ShuffleNetV2, which timm does not have, are torchvision's. In the tables ``#`` is a number, handed on
in order (``#+1`` adds one); a name that ends in a dot stands for all that start with it, the first that fits counts,
and what fits none keeps its name. Names are those below ``backbone.``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo

BACKBONE = "backbone."
DROPPED = ""
Adjust = Callable[[str, Tensor, "Fit"], "Tensor | None"]


@dataclass(frozen=True)
class Fit:
    """The two sides of a conversion: names in the checkpoint, and the network's tensors."""

    given: frozenset[str]
    wanted: Mapping[str, Tensor]


def _as_is(name: str, tensor: Tensor, fit: Fit) -> Tensor | None:
    return tensor


def _without_unused_class_token(name: str, tensor: Tensor, fit: Fit) -> Tensor | None:
    """OpenMMLab keeps the class token and its position in networks that average the patches, where it is not used."""
    if "cls_token" in fit.wanted or "head.fc.weight" not in fit.given:
        return tensor
    if name == "cls_token":
        return None
    without = tensor[:, 1:] if name == "pos_embed" and tensor.ndim == 3 else tensor
    return without if name in fit.wanted and without.shape == fit.wanted[name].shape else tensor


def _merged_as_timm(name: str, tensor: Tensor, fit: Fit) -> Tensor | None:
    """Patch merging joins the pixels of a 2×2 square: theirs as (channel, row, column), timm's (column, row, channel).

    Both the norm (``[4C]``) and the reduction (``[2C, 4C]``) have them in their last dimension.
    """
    if ".downsample." not in name or name not in fit.wanted or tensor.shape != fit.wanted[name].shape:
        return tensor
    channels = tensor.shape[-1] // 4
    return tensor.unflatten(-1, (channels, 2, 2)).transpose(-1, -3).flatten(-3)


@dataclass(frozen=True)
class Family:
    """How one kind of network is called; `sign` starts a name that only its checkpoints have."""

    names: Mapping[str, str]
    adjust: Adjust = _as_is
    sign: str = ""


_VIT = Family(
    {
        "patch_embed.projection.": "patch_embed.proj.",
        "layers.#.ln1.": "blocks.#.norm1.",
        "layers.#.ln2.": "blocks.#.norm2.",
        "layers.#.attn.gamma1.weight": "blocks.#.ls1.gamma",  # DeiT III in 1.0
        "layers.#.ffn.gamma2.weight": "blocks.#.ls2.gamma",
        "layers.#.gamma_1": "blocks.#.ls1.gamma",  # and before
        "layers.#.gamma_2": "blocks.#.ls2.gamma",
        "layers.#.attn.": "blocks.#.attn.",
        "layers.#.ffn.layers.0.0.": "blocks.#.mlp.fc1.",
        "layers.#.ffn.layers.1.": "blocks.#.mlp.fc2.",
        "ln1.": "norm.",
        "ln2.": "fc_norm.",
    },
    _without_unused_class_token,
)
_RESNET = Family({})
_RESNET_V1D = Family(
    {
        "stem.0.conv.": "conv1.0.",
        "stem.0.bn.": "conv1.1.",
        "stem.1.conv.": "conv1.3.",
        "stem.1.bn.": "conv1.4.",
        "stem.2.conv.": "conv1.6.",
        "stem.2.bn.": "bn1.",
        "layer1.0.downsample.#.": "layer1.0.downsample.#+1.",  # timm has an Identity for the pooling here
    },
    sign="stem.",
)
_REGNET = Family(
    {
        "conv1.": "stem.conv.",
        "bn1.": "stem.bn.",
        "layer#.#.conv#.": "s#.b#+1.conv#.conv.",
        "layer#.#.bn#.": "s#.b#+1.conv#.bn.",
        "layer#.#.downsample.0.": "s#.b#+1.downsample.conv.",
        "layer#.#.downsample.1.": "s#.b#+1.downsample.bn.",
    }
)
_MOBILENET_V2 = Family(
    {
        "conv1.conv.": "conv_stem.",
        "conv1.bn.": "bn1.",
        "conv2.conv.": "conv_head.",
        "conv2.bn.": "bn2.",
        "layer1.0.conv.0.conv.": "blocks.0.0.conv_dw.",
        "layer1.0.conv.0.bn.": "blocks.0.0.bn1.",
        "layer1.0.conv.1.conv.": "blocks.0.0.conv_pw.",
        "layer1.0.conv.1.bn.": "blocks.0.0.bn2.",
        "layer#.#.conv.0.conv.": "blocks.#-1.#.conv_pw.",
        "layer#.#.conv.0.bn.": "blocks.#-1.#.bn1.",
        "layer#.#.conv.1.conv.": "blocks.#-1.#.conv_dw.",
        "layer#.#.conv.1.bn.": "blocks.#-1.#.bn2.",
        "layer#.#.conv.2.conv.": "blocks.#-1.#.conv_pwl.",
        "layer#.#.conv.2.bn.": "blocks.#-1.#.bn3.",
    },
    sign="layer1.",
)
_UNITS = ("0.0", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "3.2", "3.3", "3.4", "3.5", "4.0", "4.1")
_PARTS = {"0.": "conv_dw.", "1.": "bn1.", "3.": "conv_pw.", "4.": "bn2."}


def _mobilenet_v1(stem: str, units: tuple[str, ...], sign: str) -> Family:
    """cls_KD and ScaleKD number the same thirteen units differently."""
    blocks = {
        f"{theirs}.{part}": f"blocks.{ours}.{name}"
        for theirs, ours in zip(units, _UNITS, strict=True)
        for part, name in _PARTS.items()
    }
    return Family({f"{stem}.0.": "conv_stem.", f"{stem}.1.": "bn1.", **blocks}, sign=sign)


_MOBILENET_V1_CLS_KD = _mobilenet_v1("model.0", (*(f"model.{unit}" for unit in range(1, 12)), "s4.0", "s4.1"), "model.")
_MOBILENET_V1_SCALEKD = _mobilenet_v1(
    "s1.0",
    ("s1.1", "s1.2", "s1.3", "s2.0", "s2.1", "s2.2", "s2.3", "s3.0", "s3.1", "s3.2", "s3.3", "s4.0", "s4.1"),
    "s1.",
)
_SWIN = Family(
    {
        "patch_embed.projection.": "patch_embed.proj.",
        "stages.#.blocks.#.attn.w_msa.relative_position_index": DROPPED,  # follows from the window
        "stages.#.blocks.#.attn.w_msa.": "layers.#.blocks.#.attn.",
        "stages.#.blocks.#.ffn.layers.0.0.": "layers.#.blocks.#.mlp.fc1.",
        "stages.#.blocks.#.ffn.layers.1.": "layers.#.blocks.#.mlp.fc2.",
        "stages.#.blocks.#.": "layers.#.blocks.#.",
        "stages.#.downsample.": "layers.#+1.downsample.",
        "norm0.": DROPPED,  # of maps that only a distillation loss saw
        "norm1.": DROPPED,
        "norm2.": DROPPED,
        "norm3.": "norm.",
    },
    _merged_as_timm,
)
_CONVNEXT = Family(
    {
        "downsample_layers.0.": "stem.",
        "downsample_layers.#.": "stages.#.downsample.",
        "stages.#.#.depthwise_conv.": "stages.#.blocks.#.conv_dw.",
        "stages.#.#.pointwise_conv1.": "stages.#.blocks.#.mlp.fc1.",
        "stages.#.#.pointwise_conv2.": "stages.#.blocks.#.mlp.fc2.",
        "stages.#.#.": "stages.#.blocks.#.",
        "norm3.": "norm_pre.",
    }
)
_MIXER = Family(
    {
        "patch_embed.projection.": "stem.proj.",
        "layers.#.ln1.": "blocks.#.norm1.",
        "layers.#.ln2.": "blocks.#.norm2.",
        "layers.#.token_mix.layers.0.0.": "blocks.#.mlp_tokens.fc1.",
        "layers.#.token_mix.layers.1.": "blocks.#.mlp_tokens.fc2.",
        "layers.#.channel_mix.layers.0.0.": "blocks.#.mlp_channels.fc1.",
        "layers.#.channel_mix.layers.1.": "blocks.#.mlp_channels.fc2.",
        "ln1.": "norm.",
    }
)
_SHUFFLENET_V2 = Family(
    {
        "conv1.conv.": "conv1.0.",
        "conv1.bn.": "conv1.1.",
        "layers.#.#.branch1.0.conv.": "stage#+2.#.branch1.0.",
        "layers.#.#.branch1.0.bn.": "stage#+2.#.branch1.1.",
        "layers.#.#.branch1.1.conv.": "stage#+2.#.branch1.2.",
        "layers.#.#.branch1.1.bn.": "stage#+2.#.branch1.3.",
        "layers.#.#.branch2.0.conv.": "stage#+2.#.branch2.0.",
        "layers.#.#.branch2.0.bn.": "stage#+2.#.branch2.1.",
        "layers.#.#.branch2.1.conv.": "stage#+2.#.branch2.3.",  # behind a ReLU, which has a number here
        "layers.#.#.branch2.1.bn.": "stage#+2.#.branch2.4.",
        "layers.#.#.branch2.2.conv.": "stage#+2.#.branch2.5.",
        "layers.#.#.branch2.2.bn.": "stage#+2.#.branch2.6.",
        "layers.3.conv.": "conv5.0.",
        "layers.3.bn.": "conv5.1.",
    }
)
# timm's or torchvision's class, or one that the network derives from → the families whose weights it can take
FAMILIES: Mapping[str, tuple[Family, ...]] = {
    "VisionTransformer": (_VIT,),
    "Eva": (_VIT,),
    "ResNet": (_RESNET_V1D, _RESNET),
    "RegNet": (_REGNET,),
    "EfficientNet": (_MOBILENET_V2, _MOBILENET_V1_CLS_KD, _MOBILENET_V1_SCALEKD),
    "SwinTransformer": (_SWIN,),
    "ConvNeXt": (_CONVNEXT,),
    "MlpMixer": (_MIXER,),
    "ShuffleNetV2": (_SHUFFLENET_V2,),
}


def is_openmmlab(names: frozenset[str]) -> bool:
    """True when weights are named as OpenMMLab's classifiers name them."""
    return any(name.startswith(BACKBONE) for name in names)


def to_timm(given: Mapping[str, Tensor], network: nn.Module, info: ModelInfo) -> list[tuple[str, str, Tensor]]:
    """Rename weights, and reorder those whose layout differs.

    Args:
        given: ``backbone.*`` and ``head.*``.
        network: the network that shall hold them, on any device.
        info: its facts; they say how its classifiers are called.

    Returns:
        (their name, the network's name, tensor) of every weight that the network can need. A name that the tables do
        not know is among them.

    Raises:
        UserError: there is no table for this kind of network.
    """
    fit = Fit(frozenset(given), network.state_dict())
    family = _family(network, info, fit.given)
    heads = {"head.fc.": info.head, "head.layers.head.": info.head, "head.layers.head_dist.": info.dist_head}
    rules = {
        "": _compiled({theirs: f"{ours}." for theirs, ours in heads.items() if ours}),
        BACKBONE: _compiled(family.names),
    }
    converted = []
    for name, tensor in given.items():
        place = BACKBONE if name.startswith(BACKBONE) else ""
        ours = _renamed(name.removeprefix(place), rules[place])
        adjusted = family.adjust(ours, tensor, fit)
        if ours != DROPPED and adjusted is not None:
            converted.append((name, ours, adjusted))
    return converted


def _family(network: nn.Module, info: ModelInfo, given: frozenset[str]) -> Family:
    kinds = [kind.__name__ for kind in type(network).__mro__ if kind.__name__ in FAMILIES]
    if not kinds:
        raise UserError(
            f"--arch {info.name}: there is no table of OpenMMLab's names for a {type(network).__name__}; "
            f"there is for {', '.join(FAMILIES)}"
        )
    families = FAMILIES[kinds[0]]
    fitting = (one for one in families if any(name.startswith(BACKBONE + one.sign) for name in given))
    return next(fitting, families[-1])


def _compiled(names: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.escape(theirs).replace(r"\#", r"(\d+)") + ("" if theirs.endswith(".") else "$")), ours)
        for theirs, ours in names.items()
    ]


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    """A name by the first rule that fits; unchanged when there is none."""
    for pattern, ours in rules:
        if match := pattern.match(name):
            return ours and _filled(ours, match.groups()) + name[match.end() :]
    return name


def _filled(template: str, numbers: tuple[str, ...]) -> str:
    """The template with the numbers in the places of its ``#``."""
    left = iter(numbers)
    return re.sub(r"#([+-]\d+)?", lambda place: str(int(next(left)) + int(place[1] or 0)), template)
