"""A network with the facts about it, and how the facts are read from a live network.

Everything that differs between model families lives in the tables of this file. A family that is not described
here still gives logits, ``pre_logits`` and ``module:`` taps; it only has no named stages or blocks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kd_hf.compat import timm_prefix_count
from kd_hf.info import ModelInfo, PreActivation, Preprocessing, Stage

# timm classes whose feature_info names modules that do not return the feature it means, as one tensor in one layout
_TIMM_IRREGULAR = frozenset(
    {"CoaT", "ConVit", "CrossVit", "EfficientFormer", "Hiera", "Levit", "LevitDistilled", "PoolingVisionTransformer"}
    | {"TNT", "Twins", "VOLO"}
)
# timm attributes that hold blocks run after the patch blocks; only they see the class token
_TIMM_LATE_CLASS_BLOCKS = ("blocks_token_only", "cls_attn_blocks")

# transformers model_type → what a stage or block returns: "blocks" for a plain transformer, else a stage layout
_TRANSFORMERS_FAMILIES = {
    "vit": "blocks",
    "deit": "blocks",
    "beit": "blocks",
    "data2vec-vision": "blocks",
    "dinov2": "blocks",
    "dinov2_with_registers": "blocks",
    "ijepa": "blocks",
    "vit_msn": "blocks",
    "swin": "NLC",
    "swinv2": "NLC",
    "resnet": "NCHW",
    "regnet": "NCHW",
    "convnext": "NCHW",
    "convnextv2": "NCHW",
}
# a block that ends in an activation → that module, and the BatchNorm before it, relative to the block
_LAST_ACTIVATION = {
    "timm.models.resnet.BasicBlock": ("act2", "bn2"),
    "timm.models.resnet.Bottleneck": ("act3", "bn3"),
    "timm.models.regnet.Bottleneck": ("act3", "conv3.bn"),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": ("bn2.act", "bn2"),
    "transformers.models.resnet.modeling_resnet.ResNetBasicLayer": ("activation", "layer.1.normalization"),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": ("activation", "layer.2.normalization"),
    "transformers.models.regnet.modeling_regnet.RegNetXLayer": ("activation", "layer.2.normalization"),
    "transformers.models.regnet.modeling_regnet.RegNetYLayer": ("activation", "layer.3.normalization"),
}
# modules beside torch's own that run their children one after the other
_IN_ORDER = frozenset(
    {"timm.models.regnet.RegStage"}
    | {f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}Stage" for name in ("ResNet", "RegNet")}
)
# where the repeated modules and the final norm may live inside a transformers base model, in order of preference
_TRANSFORMERS_REPEATED = ("encoder.stages", "encoder.layers", "encoder.layer", "layers")
_TRANSFORMERS_NORMS = ("layernorm", "layer_norm", "norm")
_TRANSFORMERS_PREFIX = {"cls": "cls_token", "dist": "distillation_token"}


@dataclass(frozen=True)
class Origin:
    """Where a network came from: enough to name it and to build it again."""

    library: str  # "timm" | "transformers" | "kd_hf" | "torch"
    architecture: str  # timm's name, or the model_type of transformers' configuration
    source: str = ""  # what the user wrote
    revision: str | None = None
    pretrained: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # constructor (timm) or configuration (transformers)


@dataclass
class ModelHandle:
    """A live network, its facts, the names of its classes (empty when unknown) and its origin."""

    network: nn.Module
    info: ModelInfo
    origin: Origin
    label_names: tuple[str, ...] = ()
    image_processor: Any = None
    """The processor of transformers that is saved with it, where the one that `info` describes would not do."""

    def weights_hash(self) -> str:
        """Sixteen hex digits over parameters and buffers, by name."""
        total = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            total.update(key.encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()[:16]

    def note(self) -> dict[str, Any]:
        """Plain facts for a log."""
        origin = self.origin
        return {
            "name": self.info.name,
            "source": origin.source,
            "parameters": self.info.parameters,
            "library": origin.library,
            "architecture": origin.architecture,
            "revision": origin.revision,
        }


def describe_timm(network: nn.Module, name: str, preprocessing: Preprocessing) -> ModelInfo:
    """Read the facts of a network built by timm.

    Args:
        network: any timm classifier, in any mode and on any device (nothing is run).
        name: how the user calls it; error messages repeat it.
        preprocessing: what :func:`kd_hf.models.load.load_model` resolved for it.
    """
    facts = _common(network, name, "timm", preprocessing)
    head, dist_head = _timm_heads(network, facts["modules"])
    facts |= {"num_classes": _attribute(network, "num_classes", int, 0), "head": head, "dist_head": dist_head}
    levels = _timm_levels(network, facts["modules"])
    if _is_plain(network, levels):
        prefix = _timm_prefix(network)
        late = any(_attribute(network, key, nn.Module, None) is not None for key in _TIMM_LATE_CLASS_BLOCKS)
        facts |= {
            "blocks": tuple(f"blocks.{index}" for index in range(_length(network.get_submodule("blocks")))),
            "prefix": prefix,
            "block_prefix": () if late else prefix,
            "norm": "norm",
            "stages": (Stage("norm", levels[-1][1], "NLC"),),
        }
    else:
        layout = _attribute(network, "output_fmt", str, "NCHW")
        facts["stages"] = tuple(
            Stage(path, channels, layout, pre_activation(network, path)) for path, channels, _ in _pyramid(levels)
        )
        if (
            facts["stages"]
            and layout == "NHWC"
            and isinstance(_attribute(network, "norm", nn.Module, None), nn.LayerNorm)
        ):
            facts["norm"] = "norm"
    return ModelInfo(**facts)


def describe_transformers(network: nn.Module, name: str, preprocessing: Preprocessing) -> ModelInfo:
    """Read the facts of an image classifier of transformers (see :func:`describe_timm` for the arguments)."""
    config: Any = network.config
    facts = _common(network, name, "transformers", preprocessing)
    root = _attribute(network, "base_model_prefix", str, "")
    head, dist_head = _linear_heads(network, root, config.num_labels)
    facts |= {"num_classes": config.num_labels, "head": head, "dist_head": dist_head}
    family = _TRANSFORMERS_FAMILIES.get(config.model_type)
    repeated = _first_module(network, root, _TRANSFORMERS_REPEATED)
    if family is None or repeated is None:
        return ModelInfo(**facts)
    norm = _first_module(network, root, _TRANSFORMERS_NORMS)
    paths = tuple(f"{repeated}.{index}" for index in range(_length(network.get_submodule(repeated))))
    if family == "blocks" and norm is not None:
        prefix = _transformers_prefix(network.get_submodule(f"{root}.embeddings"), config)
        facts |= {"blocks": paths, "prefix": prefix, "block_prefix": prefix, "norm": norm}
        facts["stages"] = (Stage(norm, config.hidden_size, "NLC"),)
    elif family != "blocks":
        widths = _transformers_widths(config, len(paths))
        tapped = (_before_downsampling(network, path) for path in paths)
        facts["stages"] = tuple(
            Stage(path, width, family, pre_activation(network, path))
            for path, width in zip(tapped, widths, strict=True)
        )
        facts["norm"] = norm if family == "NLC" else None
    return ModelInfo(**facts)


def describe_torch(network: nn.Module, name: str, num_classes: int, preprocessing: Preprocessing) -> ModelInfo:
    """Facts of any other classifier: its last Linear with `num_classes` outputs is taken for the head."""
    facts = _common(network, name, "torch", preprocessing)
    heads = [path for path, module in network.named_modules() if _is_linear(module, num_classes)]
    return ModelInfo(**facts, num_classes=num_classes, head=heads[-1] if heads else None)


def pre_activation(network: nn.Module, path: str) -> PreActivation | None:
    """Where the feature before the last ReLU of the stage `path` is found; None where the stage ends in none."""
    if path in (named := _named_ends(network)):
        return named[path]
    module = network.get_submodule(path)
    while (kind := f"{type(module).__module__}.{type(module).__name__}") not in _LAST_ACTIVATION:
        children = list(module.named_children())
        in_order = isinstance(module, (nn.Sequential, nn.ModuleList)) or kind in _IN_ORDER
        if not in_order or not children:
            return None
        name, module = children[-1]
        path = f"{path}.{name}"
    activation, norm = _LAST_ACTIVATION[kind]
    if not isinstance(module.get_submodule(activation), (nn.ReLU, nn.ReLU6)):
        return None
    return PreActivation(f"{path}.{activation}", norm=f"{path}.{norm}")


def _common(network: nn.Module, name: str, library: str, preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "name": name,
        "library": library,
        "preprocessing": preprocessing,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "modules": tuple(path for path, _ in network.named_modules() if path),
    }


def _attribute(network: nn.Module, name: str, kind: type, default: Any) -> Any:
    """An attribute when it is there and of the expected type, else `default`."""
    value = getattr(network, name, default)
    return value if isinstance(value, kind) else default


def _length(module: nn.Module) -> int:
    return sum(1 for _ in module.children())


def _is_linear(module: nn.Module, outputs: int) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == outputs


# timm


def _named_ends(network: nn.Module) -> dict[str, PreActivation | None]:
    """Where each stage is before its last ReLU, on networks that say so themselves."""
    features: Any = getattr(network, "feature_info", None) or []
    return {
        entry["module"]: PreActivation(entry["act"], "input", entry["norm"]) if entry["act"] else None
        for entry in getattr(features, "info", features)
        if "act" in entry
    }


def _timm_levels(network: nn.Module, modules: tuple[str, ...]) -> list[tuple[str, int, float]]:
    """(module path, channels, reduction) of every entry of feature_info; empty for irregular families."""
    features: Any = getattr(network, "feature_info", None) or []
    entries = [(entry["module"], entry["num_chs"], entry["reduction"]) for entry in getattr(features, "info", features)]
    irregular = type(network).__name__ in _TIMM_IRREGULAR or any(path not in modules for path, _, _ in entries)
    return [] if irregular else entries


def _is_plain(network: nn.Module, levels: list[tuple[str, int, float]]) -> bool:
    """True for a stack of equal blocks over one token sequence: ViT and its relatives, MLP-Mixer, CaiT."""
    one_shape = len({(channels, reduction) for _, channels, reduction in levels}) == 1
    in_blocks = all(path.startswith("blocks.") for path, _, _ in levels)
    parts = (_attribute(network, name, nn.Module, None) for name in ("blocks", "norm"))
    return one_shape and in_blocks and all(part is not None for part in parts)


def _pyramid(levels: list[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """The levels after the stem, or none where resolution does not change.

    The first entry is a stem when its module is not a sibling of the second (`act1` before `layer1`, …).
    """
    if len({reduction for _, _, reduction in levels}) < 2:
        return []
    families = {re.sub(r"\d+$", "", path) for path, _, _ in levels[:2]}
    return levels[1:] if len(families) == 2 else levels


def _timm_prefix(network: nn.Module) -> tuple[str, ...]:
    """Names of the tokens before the patches: as the network says, or class, distillation, registers (timm's order)."""
    own = _attribute(network, "prefix_tokens", tuple, ())
    if own:
        return own
    count = timm_prefix_count(network)
    named = [token for token in ("cls", "dist") if getattr(network, f"{token}_token", None) is not None][:count]
    return (*named, *(f"reg{index}" for index in range(count - len(named))))


def _timm_heads(network: nn.Module, modules: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Paths of the classifier and of the distillation token's classifier; None when there is not exactly one."""
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    classifier = config.get("classifier")
    paths = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    dist = [path for path in paths if "dist" in path and path in modules]
    plain = [path for path in paths if "dist" not in path and path in modules]
    return (plain[0] if len(plain) == 1 else None), (dist[0] if len(dist) == 1 else None)


# transformers


def _first_module(network: nn.Module, root: str, names: tuple[str, ...]) -> str | None:
    known = {path for path, _ in network.named_modules()}
    return next((path for name in names if (path := f"{root}.{name}") in known), None)


def _transformers_prefix(embeddings: nn.Module, config: Any) -> tuple[str, ...]:
    named = [name for name, key in _TRANSFORMERS_PREFIX.items() if getattr(embeddings, key, None) is not None]
    registers = getattr(config, "num_register_tokens", 0) if hasattr(embeddings, "register_tokens") else 0
    return (*named, *(f"reg{index}" for index in range(registers)))


def _transformers_widths(config: Any, count: int) -> list[int]:
    """Channels of each stage, from `hidden_sizes`, or doubling from `embed_dim` (Swin)."""
    sizes = getattr(config, "hidden_sizes", None)
    return list(sizes) if sizes else [config.embed_dim * 2**index for index in range(count)]


def _before_downsampling(network: nn.Module, path: str) -> str:
    """Swin's stages end with the next level's patch merging; their last block is the level's own output."""
    stage = network.get_submodule(path)
    if not hasattr(stage, "downsample"):
        return path
    return f"{path}.blocks.{_length(stage.get_submodule('blocks')) - 1}"


def _linear_heads(network: nn.Module, root: str, outputs: int) -> tuple[str | None, str | None]:
    """Classifier and distillation classifier: the Linear modules outside the base model."""
    paths = [
        path for path, module in network.named_modules() if _is_linear(module, outputs) and path.split(".")[0] != root
    ]
    dist = [path for path in paths if "dist" in path]
    plain = [path for path in paths if "dist" not in path]
    return (plain[-1] if plain else None), (dist[-1] if dist else None)
