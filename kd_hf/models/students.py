"""Student networks of the papers that neither timm nor transformers has under a name: ``kd_hf/<name>`` in a recipe.

=========================  =====================================================================  ==================
name                       network                                                                artefact
=========================  =====================================================================  ==================
``conv_stem_deit_tiny``    VkD: distilled DeiT, convolutional stem, mean patch as distillation     brings its code
``conv_stem_deit_small``   token (also ``_base``)
``mixer_b14``              ScaleKD: MLP-Mixer-B with 14-pixel patches                             brings its code
``mobilenetv1_relu``       cls_KD and ScaleKD: MobileNetV1 with ReLU where timm has ReLU6          stock timm
``vit_small_patch16_gap``  ScaleKD: ViT without class token, mean of the normalised tokens         stock timm
``vit_base_patch16_gap``
``vit_base_patch14_gap``   ScaleKD: the same, and a second norm behind the mean                    stock timm
``resnet18_cifar``         cls_KD: ResNet with a 3×3 stem and no max-pooling, for 32 pixels        brings its code
``resnet34_cifar``
``shufflenetv2_x1``        cls_KD: torchvision's ShuffleNetV2 1×                                  brings its code
``resnet8``, 14, 20, 32,   RepDistiller and mdistiller: ResNet of 6n + 2 layers in three stages,  brings its code
44, 56, 110                for CIFAR
``resnet8x4``, ``32x4``    the same, four times as wide behind a stem twice as wide               brings its code
``wrn_16_1``, ``16_2``,    RepDistiller and mdistiller: Wide ResNet (layers, width), for CIFAR    brings its code
``40_1``, ``40_2``
``vgg8``, 11, 13, 16, 19   RepDistiller and mdistiller: VGG with BatchNorm, for CIFAR             brings its code
``mobilenetv2_half``       RepDistiller and mdistiller: MobileNetV2 with half the channels and    brings its code
                           ReLU, for CIFAR
``shufflenetv1_cifar``     RepDistiller and mdistiller: ShuffleNet with three groups, and         brings its code
``shufflenetv2_cifar``     ShuffleNetV2 1×, for CIFAR
``resnet50_cifar``         mdistiller: as ``resnet18_cifar``, but without zeros at the start (its brings its code
                           ResNet-18 and -34 are those above with ``zero_init_last: false``)
=========================  =====================================================================  ==================

Those of RepDistiller and mdistiller see CIFAR-100's mean and std and whole images of 32 pixels. All others see
ImageNet's, and those for ImageNet are evaluated on the central 224 of 256 pixels, as their papers do. A stock
network is one of timm's with the arguments below, so timm and transformers load its artefact as it is. The others are
written in one file each that is copied into the artefact; transformers runs it there when told to
(``trust_remote_code=True``), while :func:`kd_hf.models.load.load_model` knows the network and needs no such leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_hf.errors import UserError, nearest
from kd_hf.info import Preprocessing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LIBRARY = "kd_hf"


@dataclass(frozen=True)
class Own:
    """A network whose code travels with it: how transformers holds its configuration and itself, and its classes."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    network: Callable[[Any], nn.Module]


@dataclass(frozen=True)
class Student:
    """A named network: of `architecture` (timm's, or the model type of an :class:`Own`) with `arguments`."""

    library: str  # "timm" or LIBRARY
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    initialise: Callable[[nn.Module], None] | None = None  # where the architecture's own initial weights are not meant
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


def _conv_stem_deit() -> Own:
    from kd_hf.models.conv_stem_deit import ConvStemDeit, ConvStemDeitConfig, ConvStemDeitForImageClassification

    return Own(ConvStemDeitConfig, ConvStemDeitForImageClassification, ConvStemDeit)


def _mlp_mixer() -> Own:
    from kd_hf.models.mlp_mixer import AnyPatchMixer, MlpMixerConfig, MlpMixerForImageClassification

    return Own(MlpMixerConfig, MlpMixerForImageClassification, AnyPatchMixer)


def _cifar_resnet() -> Own:
    from kd_hf.models.cifar_resnet import CifarResNet, CifarResNetConfig, CifarResNetForImageClassification

    return Own(CifarResNetConfig, CifarResNetForImageClassification, CifarResNet)


def _as_vit(network: nn.Module) -> None:
    """A ViT's initial weights; EVA divides those at the end of each branch, and of the classifier, by a factor."""
    from timm.layers import trunc_normal_

    for module in network.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)


def _shufflenetv2() -> Own:
    from kd_hf.models.shufflenetv2 import ShuffleNet, ShuffleNetV2Config, ShuffleNetV2ForImageClassification

    return Own(ShuffleNetV2Config, ShuffleNetV2ForImageClassification, ShuffleNet)


def _three_stage_resnet() -> Own:
    from kd_hf.models import three_stage_resnet as file

    return Own(file.ThreeStageResNetConfig, file.ThreeStageResNetForImageClassification, file.ThreeStageResNet)


def _wide_resnet() -> Own:
    from kd_hf.models import wide_resnet as file

    return Own(file.WideResNetConfig, file.WideResNetForImageClassification, file.WideResNet)


def _small_vgg() -> Own:
    from kd_hf.models import small_vgg as file

    return Own(file.SmallVggConfig, file.SmallVggForImageClassification, file.SmallVgg)


def _small_mobilenetv2() -> Own:
    from kd_hf.models import small_mobilenetv2 as file

    return Own(file.SmallMobileNetV2Config, file.SmallMobileNetV2ForImageClassification, file.SmallMobileNetV2)


def _small_shufflenetv1() -> Own:
    from kd_hf.models import small_shufflenetv1 as file

    return Own(file.SmallShuffleNetV1Config, file.SmallShuffleNetV1ForImageClassification, file.SmallShuffleNetV1)


def _small_shufflenetv2() -> Own:
    from kd_hf.models import small_shufflenetv2 as file

    return Own(file.SmallShuffleNetV2Config, file.SmallShuffleNetV2ForImageClassification, file.SmallShuffleNetV2)


# by model_type
OWN: Mapping[str, Callable[[], Own]] = {
    "kd_hf_conv_stem_deit": _conv_stem_deit,
    "kd_hf_mlp_mixer": _mlp_mixer,
    "kd_hf_cifar_resnet": _cifar_resnet,
    "kd_hf_shufflenetv2": _shufflenetv2,
    "kd_hf_three_stage_resnet": _three_stage_resnet,
    "kd_hf_wide_resnet": _wide_resnet,
    "kd_hf_small_vgg": _small_vgg,
    "kd_hf_small_mobilenetv2": _small_mobilenetv2,
    "kd_hf_small_shufflenetv1": _small_shufflenetv1,
    "kd_hf_small_shufflenetv2": _small_shufflenetv2,
}
_CONV_STEM = partial(Student, LIBRARY, "kd_hf_conv_stem_deit")
_GAP = {"class_token": False, "global_pool": "avg"}
# EVA-02 is timm's only ViT that can have a norm before and another after the pooling; the rest of it is undone
_PLAIN_EVA = {
    "attn_type": "rope",  # with no rotary positions: attention with a bias on the keys too
    "qkv_fused": True,
    "mlp_ratio": 4.0,
    "swiglu_mlp": False,
    "scale_mlp": False,
    "use_rot_pos_emb": False,
    "use_post_transformer_norm": True,
    "use_fc_norm": True,
    "num_classes": 1000,
}
CIFAR = Preprocessing(32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "bicubic", 1.0)
CIFAR_CLASSES = 100


def _cifar(model_type: str, **arguments: Any) -> Student:
    """A network of RepDistiller and mdistiller."""
    return Student(LIBRARY, model_type, {**arguments, "num_labels": CIFAR_CLASSES}, preprocessing=CIFAR)


def _cifar_networks() -> Iterator[tuple[str, Student]]:
    """RepDistiller's and mdistiller's networks by name."""
    resnet = partial(_cifar, "kd_hf_three_stage_resnet")
    for layers in (8, 14, 20, 32, 44, 56, 110):
        yield f"resnet{layers}", resnet(depths=[(layers - 2) // 6] * 3, widths=[16, 16, 32, 64])
    for layers in (8, 32):
        yield f"resnet{layers}x4", resnet(depths=[(layers - 2) // 6] * 3, widths=[32, 64, 128, 256])
    for layers, width in ((16, 1), (16, 2), (40, 1), (40, 2)):
        sizes = {"depths": [(layers - 4) // 6] * 3, "widths": [16, 16 * width, 32 * width, 64 * width]}
        yield f"wrn_{layers}_{width}", _cifar("kd_hf_wide_resnet", **sizes)
    for layers, depths in {8: "11111", 11: "11222", 13: "22222", 16: "22333", 19: "22444"}.items():
        yield f"vgg{layers}", _cifar("kd_hf_small_vgg", depths=[int(depth) for depth in depths])
    yield "mobilenetv2_half", _cifar("kd_hf_small_mobilenetv2", width=0.5)
    yield "shufflenetv1_cifar", _cifar("kd_hf_small_shufflenetv1")
    yield "shufflenetv2_cifar", _cifar("kd_hf_small_shufflenetv2")
    bottlenecks = {"depths": [3, 4, 6, 3], "bottleneck": True, "zero_init_last": False}
    yield "resnet50_cifar", _cifar("kd_hf_cifar_resnet", **bottlenecks)


STUDENTS: Mapping[str, Student] = {
    **dict(_cifar_networks()),
    "conv_stem_deit_tiny": _CONV_STEM({"embed_dim": 192, "num_heads": 3, "num_labels": 1000}),
    "conv_stem_deit_small": _CONV_STEM({"embed_dim": 384, "num_heads": 6, "num_labels": 1000}),
    "conv_stem_deit_base": _CONV_STEM({"embed_dim": 768, "num_heads": 12, "num_labels": 1000}),
    "mixer_b14": Student(LIBRARY, "kd_hf_mlp_mixer", {"num_labels": 1000}),
    "resnet18_cifar": Student(LIBRARY, "kd_hf_cifar_resnet", {"depths": [2, 2, 2, 2], "num_labels": 100}),
    "resnet34_cifar": Student(LIBRARY, "kd_hf_cifar_resnet", {"depths": [3, 4, 6, 3], "num_labels": 100}),
    "shufflenetv2_x1": Student(LIBRARY, "kd_hf_shufflenetv2", {"num_labels": 1000}),
    "mobilenetv1_relu": Student("timm", "mobilenetv1_100", {"act_layer": "relu"}),
    "vit_small_patch16_gap": Student("timm", "deit_small_patch16_224", {**_GAP, "fc_norm": False}),
    "vit_base_patch16_gap": Student("timm", "deit_base_patch16_224", {**_GAP, "fc_norm": False}),
    "vit_base_patch14_gap": Student("timm", "eva02_base_patch14_224", {**_GAP, **_PLAIN_EVA}, _as_vit),
}
# what timm's configuration of the architecture would say otherwise
STOCK_FACTS = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def find_student(name: str, model: str) -> Student:
    """The network called ``kd_hf/<name>``; `model` is what the user wrote.

    Raises:
        UserError: there is none of that name; the message has the nearest.
    """
    if name not in STUDENTS:
        raise UserError(f"model '{model}': kd_hf has no network '{name}'.{nearest(name, STUDENTS)}")
    return STUDENTS[name]


def read_weights(network: nn.Module, folder: Path) -> None:
    """Load the safetensors of an artefact into a network; a classifier of another size stays as it is.

    Raises:
        RuntimeError: other names or shapes than the network's.
    """
    from safetensors.torch import load_file

    weights = {
        key.removeprefix("network."): value
        for path in sorted(folder.glob("model*.safetensors"))
        for key, value in load_file(path).items()
    }
    facts: Any = network.pretrained_cfg
    classifier = facts["classifier"]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for key, value in network.state_dict().items():
        if key.rpartition(".")[0] in heads and key in weights and weights[key].shape != value.shape:
            weights[key] = value
    network.load_state_dict(weights)


def as_transformers(network: nn.Module) -> PreTrainedModel:
    """The weightless shell in which transformers holds a network of :data:`OWN`; its keys start with ``network.``."""
    import torch

    config: Any = network.config
    with torch.device("meta"):
        return OWN[config.model_type]().model(config)
