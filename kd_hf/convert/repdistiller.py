"""Networks of RepDistiller and mdistiller: which of ours they are, and their weights by our names.

Their checkpoints lie in folders that are named after the network, ``resnet32x4_vanilla/ckpt_epoch_240.pth``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kd_hf.models.cifar_resnet import CifarResNetConfig
from kd_hf.models.handle import ModelHandle
from kd_hf.models.students import CIFAR, STUDENTS

# the networks that have another name here
_RENAMED = {
    "MobileNetV2": "mobilenetv2_half",
    "ShuffleV1": "shufflenetv1_cifar",
    "ShuffleV2": "shufflenetv2_cifar",
    "ResNet18": "resnet18_cifar",
    "ResNet34": "resnet34_cifar",
    "ResNet50": "resnet50_cifar",
}
NETWORKS: Mapping[str, str] = {
    **{name: f"kd_hf/{name}" for name, student in STUDENTS.items() if student.preprocessing == CIFAR},
    **{official: f"kd_hf/{name}" for official, name in _RENAMED.items()},
}
# of the ResNets whose code is not theirs; all others have their names
_PARTS = {"shortcut": "downsample", "linear": "fc"}


def arch_of_folder(checkpoint: Path) -> str | None:
    """The network that the folder of a checkpoint is named after; None when it is not."""
    words = checkpoint.absolute().parent.name.split("_")
    return NETWORKS.get("_".join(words[:3] if words[0] == "wrn" else words[:1]))


def our_name(name: str, handle: ModelHandle) -> str:
    """The name that a tensor of an official network has in ours."""
    if handle.origin.architecture != CifarResNetConfig.model_type:
        return name
    return ".".join(_PARTS.get(part, part) for part in name.split("."))


def is_repdistiller(tensors: Mapping[str, Tensor], handle: ModelHandle) -> bool:
    """Whether a checkpoint for one of our ResNets has their names; all other networks have them anyway."""
    return handle.origin.architecture == CifarResNetConfig.model_type and "linear.weight" in tensors
