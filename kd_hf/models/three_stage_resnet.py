"""The ResNet of 6n + 2 layers in three stages, for 32-pixel images, as a network and as a transformers model.

This file and staged.py are copied into every artefact of the network and run there without this package: they need
torch and transformers only. Its parameters have the names of RepDistiller and mdistiller.

Kaiming He et al.: Deep Residual Learning for Image Recognition (CVPR 2016), section 4.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from .staged import StagedForImageClassification, StagedNetwork


class ThreeStageResNetConfig(PreTrainedConfig):
    """Sizes of a ResNet in three stages; the defaults are those of ResNet-8.

    Args:
        depths: blocks of each stage, n = (layers - 2) / 6.
        widths: channels of the stem and of the three stages.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_three_stage_resnet"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (1, 1, 1),
        widths: tuple[int, ...] | list[int] = (16, 16, 32, 64),
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.widths = list(widths)
        self.image_size = image_size
        super().__init__(**kwargs)


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H/stride, W/stride]``."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(features)))))
        return self.relu2(branch + self.downsample(features))


class ThreeStageResNet(StagedNetwork):
    """The network, built from a :class:`ThreeStageResNetConfig`."""

    classifier_path = "fc"

    def __init__(self, config: ThreeStageResNetConfig) -> None:
        super().__init__(config)
        stem, *widths = config.widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        inputs = stem
        for number, (depth, width) in enumerate(zip(config.depths, widths, strict=True), 1):
            strides = [1 if number == 1 else 2] + [1] * (depth - 1)
            blocks = [Block(inputs if index == 0 else width, width, stride) for index, stride in enumerate(strides)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            last = f"layer{number}.{depth - 1}"
            self.add_stage(f"layer{number}", width, 2 ** (number - 1), f"{last}.relu2", f"{last}.bn2")
            inputs = width
        self.fc = nn.Linear(inputs, self.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        features = self.relu(self.bn1(self.conv1(pixels)))
        for stage in self.feature_info:
            features = self.run_stage(self.get_submodule(stage["module"]), features)
        return self.fc(features.mean((2, 3)))


class ThreeStageResNetForImageClassification(StagedForImageClassification):
    """The network as transformers holds it."""

    config_class = ThreeStageResNetConfig
    network_class = ThreeStageResNet


ThreeStageResNetConfig.register_for_auto_class()
ThreeStageResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
