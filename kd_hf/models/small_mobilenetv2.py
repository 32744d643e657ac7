"""MobileNetV2 with ReLU for 32-pixel images, as a network and as a transformers model.

This file and staged.py are copied into every artefact of the network and run there without this package: they need
torch and transformers only. Its parameters have the names of RepDistiller and mdistiller.

Mark Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks (CVPR 2018).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from .staged import StagedForImageClassification, StagedNetwork, normal_fan_out

STEM, LAST = 32, 1280
# expansion, channels before the multiplier, blocks, stride
LEVELS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STAGES = (1, 2, 4, 6)  # levels whose outputs are the stages: the last of each resolution


class SmallMobileNetV2Config(PreTrainedConfig):
    """Sizes of a MobileNetV2.

    Args:
        width: multiplier of all channels but those before the classifier.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_small_mobilenetv2"

    def __init__(self, width: float = 0.5, image_size: int = 32, **kwargs: Any) -> None:
        self.width = width
        self.image_size = image_size
        super().__init__(**kwargs)


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 convolution of each channel, 1×1 projection without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_conv_norm(inputs, hidden, 1),
            nn.ReLU(inplace=True),
            *_conv_norm(hidden, hidden, 3, stride, hidden),
            nn.ReLU(inplace=True),
            *_conv_norm(hidden, outputs, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H/stride, W/stride]``."""
        return features + self.conv(features) if self.shortcut else self.conv(features)


class SmallMobileNetV2(StagedNetwork):
    """The network, built from a :class:`SmallMobileNetV2Config`. Its stages are signed: no activation follows them."""

    classifier_path = "classifier.0"

    def __init__(self, config: SmallMobileNetV2Config) -> None:
        super().__init__(config)
        inputs, reduction = int(STEM * config.width), 2
        self.conv1 = nn.Sequential(*_conv_norm(3, inputs, 3, 2), nn.ReLU(inplace=True))
        levels = []
        for index, (expansion, channels, depth, stride) in enumerate(LEVELS):
            width = int(channels * config.width)
            sizes = [(inputs, stride)] + [(width, 1)] * (depth - 1)
            levels.append(nn.Sequential(*(InvertedResidual(size, width, step, expansion) for size, step in sizes)))
            inputs, reduction = width, reduction * stride
            if index in STAGES:
                self.add_stage(f"blocks.{index}", width, reduction, None, None)
        self.blocks = nn.Sequential(*levels)
        self.conv2 = nn.Sequential(*_conv_norm(inputs, LAST, 1), nn.ReLU(inplace=True))
        linear = nn.Linear(LAST, self.num_classes)
        self.classifier = nn.Sequential(linear)
        normal_fan_out(self.modules())
        nn.init.normal_(linear.weight, 0.0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        features = self.conv1(pixels)
        for level in self.blocks:
            features = self.run_stage(level, features)
        return self.classifier(self.conv2(features).mean((2, 3)))


class SmallMobileNetV2ForImageClassification(StagedForImageClassification):
    """The network as transformers holds it."""

    config_class = SmallMobileNetV2Config
    network_class = SmallMobileNetV2


SmallMobileNetV2Config.register_for_auto_class()
SmallMobileNetV2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
