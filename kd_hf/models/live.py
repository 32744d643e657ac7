"""A live network as a handle: its facts read from itself, since no folder tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from kd_hf.compat import timm_image_size
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing
from kd_hf.models.handle import ModelHandle, Origin, describe_timm, describe_torch, describe_transformers
from kd_hf.models.students import LIBRARY, OWN

# PIL's numbers, which transformers writes, in timm's words
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def handle_of(
    model: nn.Module | ModelHandle, name: str, preprocessing: Any = None, label_names: Sequence[str] = ()
) -> ModelHandle:
    """Read the facts of a network that somebody built in Python; the network itself is not changed.

    timm's networks bring their data configuration, those of transformers their class names; of any other network
    the last Linear or Conv2d tells the number of classes. The class names of pretrained timm weights are not taken
    from the architecture: a network without those weights has the same configuration.

    Args:
        model: the network, or a handle, of which only what follows is replaced.
        name: what messages and logs call it.
        preprocessing: a :class:`Preprocessing`, or an image processor of transformers; by default what the network
            says, else ImageNet's mean and std at 224 pixels.
        label_names: of the classes, where the network does not know them or is to have others.

    Raises:
        UserError: `label_names` of another number than the classes, no way to tell their number, or a classifier of
            a timm network that was replaced behind its back.
        TypeError: neither a network nor a handle.
    """
    if isinstance(model, ModelHandle):
        handle = model
    elif isinstance(model, nn.Module):
        handle = _describe(model, name, label_names)
    else:
        raise TypeError(f"{name}: expected a torch.nn.Module or a ModelHandle, not {type(model).__name__}")
    network, info = handle.network, handle.info
    if label_names and len(label_names) != info.num_classes:
        kind = type(network).__name__
        raise UserError(f"{name}: {len(label_names)} class names were given, but {kind} has {info.num_classes} classes")
    if preprocessing is not None:
        if not isinstance(preprocessing, Preprocessing):
            preprocessing = processor_preprocessing(preprocessing.to_dict(), getattr(network, "config", None))
        info = replace(info, preprocessing=preprocessing, native=preprocessing)
    return replace(handle, info=info, label_names=tuple(label_names) or handle.label_names)


def _describe(network: nn.Module, name: str, label_names: Sequence[str]) -> ModelHandle:
    from transformers import PreTrainedModel

    config: Any = getattr(network, "config", None)
    names: tuple[str, ...] = ()
    if isinstance(network, PreTrainedModel):
        info = describe_transformers(network, name, processor_preprocessing({}, config))
        library, architecture, names = "transformers", config.model_type, config_label_names(config)
    elif getattr(config, "model_type", None) in OWN:
        info = replace(describe_timm(network, name, processor_preprocessing({}, config)), library=LIBRARY)
        library, architecture, names = LIBRARY, config.model_type, config_label_names(config)
    elif facts := timm_facts(network):
        info = describe_timm(network, name, timm_preprocessing(network))
        _check_classifier(network, info)
        library, architecture, names = "timm", facts["architecture"], tuple(facts.get("label_names") or ())
    else:
        info = describe_torch(network, name, _count_classes(network, name, label_names), Preprocessing())
        library, architecture = "torch", f"{type(network).__module__}.{type(network).__qualname__}"
    names = names if len(names) == info.num_classes else ()
    return ModelHandle(network, replace(info, native=info.preprocessing), Origin(library, architecture, name), names)


def _check_classifier(network: nn.Module, info: ModelInfo) -> None:
    head = network.get_submodule(info.head) if info.head else None
    if isinstance(head, nn.Linear) and head.out_features != info.num_classes:
        raise UserError(
            f"{info.name}: the classifier of {type(network).__name__} has {head.out_features} outputs, but its "
            f"num_classes is {info.num_classes}; replace it with network.reset_classifier({head.out_features})"
        )


def _count_classes(network: nn.Module, name: str, label_names: Sequence[str]) -> int:
    """Outputs of the last Linear or Conv2d, or as many as there are names."""
    outputs = [
        module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for module in network.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    if not outputs and not label_names:
        raise UserError(
            f"{name}: {type(network).__name__} has no Linear or Conv2d that would tell its number of classes; "
            "give a handle of it: kd_hf.models.live.handle_of(network, name, label_names=[…])"
        )
    return outputs[-1] if outputs else len(label_names)


# --- timm ---------------------------------------------------------------------------------------------------------


def timm_facts(network: nn.Module) -> dict[str, Any]:
    """timm's configuration of a network that it built; empty for others."""
    facts: Any = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    facts = facts.to_dict() if hasattr(facts, "to_dict") else facts
    return dict(facts) if isinstance(facts, Mapping) and facts.get("architecture") else {}


def timm_preprocessing(network: nn.Module) -> Preprocessing:
    """What timm would show the network."""
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(network)
    return Preprocessing(
        image_size=timm_image_size(network),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
    )


# --- transformers -------------------------------------------------------------------------------------------------


def config_label_names(config: Any) -> tuple[str, ...]:
    """The class names of a transformers configuration; none when it only numbers them."""
    labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return labels if any(label != f"LABEL_{index}" for index, label in enumerate(labels)) else ()


def processor_preprocessing(values: Mapping[str, Any], config: Any) -> Preprocessing:
    """The `values` of an image processor; ImageNet's, at the configuration's size, where it says nothing."""
    default = Preprocessing(image_size=_side(getattr(config, "image_size", None)) or Preprocessing.image_size)
    resized, cropped = _side(values.get("size")), _side(values.get("crop_size"))
    center = bool(values.get("do_center_crop", "crop_pct" in values))
    side = (cropped if center and cropped else resized) or default.image_size
    if not center and resized:
        # stretched to a square: the whole image, whatever its shape
        share, mode = 1.0, "squash"
    else:
        share, mode = values.get("crop_pct") or (side / resized if resized else default.crop_pct), "center"
    normal = values.get("do_normalize", True)
    return replace(
        default,
        image_size=side,
        mean=tuple(values.get("image_mean") or default.mean) if normal else (0.0, 0.0, 0.0),
        std=tuple(values.get("image_std") or default.std) if normal else (1.0, 1.0, 1.0),
        interpolation=RESAMPLE.get(values.get("resample", 3), default.interpolation),
        crop_pct=min(1.0, share),
        crop_mode=mode,
    )


def _side(size: Any) -> int | None:
    """Pixels of the shorter side, from the many ways a transformers file may write a size."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    if isinstance(size, (list, tuple)):
        size = min(size)
    return int(size) if size else None
