"""ShuffleNetV2 for 32-pixel images, as a network and as a transformers model.

This file and staged.py are copied into every artefact of the network and run there without this package: they need
torch and transformers only. Its parameters have the names of RepDistiller and mdistiller.

Ningning Ma et al.: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (ECCV 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from .staged import StagedForImageClassification, StagedNetwork, shuffle


class SmallShuffleNetV2Config(PreTrainedConfig):
    """Sizes of a ShuffleNetV2; the defaults are those of 1×.

    Args:
        depths: blocks of each of the three stages, the one that halves the resolution included.
        widths: channels of the stem, of the stages, and of the 1×1 convolution behind them.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_small_shufflenetv2"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (4, 8, 4),
        widths: tuple[int, ...] | list[int] = (24, 116, 232, 464, 1024),
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.widths = list(widths)
        self.image_size = image_size
        super().__init__(**kwargs)


class DownBlock(nn.Module):
    """Halves the resolution in two branches of half the output's channels each."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H/2, W/2]``."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(features))))
        right = self.bn4(self.conv4(functional.relu(self.bn3(self.conv3(features)))))
        return shuffle(self.relu(torch.cat((left, self.bn5(self.conv5(right))), 1)), 2)


class Block(nn.Module):
    """Convolutions on one half of the channels; the other half passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C, H, W]``."""
        left, right = features.chunk(2, 1)
        right = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(right)))))
        # the half that passes comes from a ReLU, so that a second one changes nothing
        return shuffle(self.relu(torch.cat((left, self.bn3(self.conv3(right))), 1)), 2)


class SmallShuffleNetV2(StagedNetwork):
    """The network, built from a :class:`SmallShuffleNetV2Config`.

    A stage before its activation is not shuffled yet, so its channels come in another order than the stage's.
    """

    classifier_path = "linear"

    def __init__(self, config: SmallShuffleNetV2Config) -> None:
        super().__init__(config)
        stem, *widths, last_width = config.widths
        self.conv1 = nn.Conv2d(3, stem, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu1 = nn.ReLU(inplace=True)
        inputs = stem
        for number, (depth, width) in enumerate(zip(config.depths, widths, strict=True), 1):
            blocks = [DownBlock(inputs, width), *(Block(width) for _ in range(depth - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.add_stage(f"layer{number}", width, 2**number, f"layer{number}.{depth - 1}.relu", None)
            inputs = width
        self.conv2 = nn.Conv2d(inputs, last_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last_width)
        self.relu2 = nn.ReLU(inplace=True)
        self.linear = nn.Linear(last_width, self.num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        features = self.relu1(self.bn1(self.conv1(pixels)))
        for stage in self.feature_info:
            features = self.run_stage(self.get_submodule(stage["module"]), features)
        return self.linear(self.relu2(self.bn2(self.conv2(features))).mean((2, 3)))


class SmallShuffleNetV2ForImageClassification(StagedForImageClassification):
    """The network as transformers holds it."""

    config_class = SmallShuffleNetV2Config
    network_class = SmallShuffleNetV2


SmallShuffleNetV2Config.register_for_auto_class()
SmallShuffleNetV2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
