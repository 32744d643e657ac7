"""ResNet for 32-pixel images, as a network and as a transformers model: a 3×3 stem of stride 1 and no max-pooling.

This file is copied into every artefact of the network and runs there without this package: it needs torch, timm and
transformers only. The network is the ResNet_CIFAR of OpenMMLab and of many distillation papers, timm's ResNet
otherwise; its parameter names are timm's.
"""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class CifarResNetConfig(PreTrainedConfig):
    """Sizes of a ResNet.

    Args:
        depths: blocks of each of the four stages: (2, 2, 2, 2) for ResNet-18, (3, 4, 6, 3) for ResNet-34 and -50.
        bottleneck: blocks of three convolutions, four times as wide (ResNet-50), instead of two.
        zero_init_last: the last BatchNorm of each block begins with a weight of 0.
        image_size: pixels per side that it is meant for; any size works.
        drop_path_rate: stochastic depth, rising over the blocks.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_cifar_resnet"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (2, 2, 2, 2),
        image_size: int = 32,
        bottleneck: bool = False,
        zero_init_last: bool = True,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.image_size = image_size
        self.bottleneck = bottleneck
        self.zero_init_last = zero_init_last
        self.drop_path_rate = drop_path_rate
        super().__init__(**kwargs)


class CifarResNet(ResNet):
    """timm's ResNet with another stem, built from a :class:`CifarResNetConfig`."""

    def __init__(self, config: CifarResNetConfig) -> None:
        block: Any = Bottleneck if config.bottleneck else BasicBlock  # timm's annotation means an instance
        super().__init__(
            block,
            tuple(config.depths),
            num_classes=config.num_labels or 0,
            drop_path_rate=config.drop_path_rate,
            zero_init_last=config.zero_init_last,
        )
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.set_submodule("conv1", stem)
        self.set_submodule("maxpool", nn.Identity())
        levels: Any = self.feature_info
        for level in levels:  # the stem no longer divides the resolution by 4
            level["reduction"] = max(1, level["reduction"] // 4)
        self.config = config
        self.pretrained_cfg = {"classifier": "fc", "input_size": (3, config.image_size, config.image_size)}


class CifarResNetForImageClassification(PreTrainedModel):
    """The network as transformers holds it."""

    config_class = CifarResNetConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.network = CifarResNet(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits ``[B, K]`` of ``[B, 3, H, W]``, and the cross-entropy when labels ``[B]`` are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
