"""ShuffleNet for 32-pixel images, as a network and as a transformers model.

This file and staged.py are copied into every artefact of the network and run there without this package: they need
torch and transformers only. Its parameters have the names of RepDistiller and mdistiller.

Xiangyu Zhang et al.: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices (CVPR 2018).
Unlike the paper's, its blocks have a ReLU behind the 3×3 convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from .staged import StagedForImageClassification, StagedNetwork, shuffle


class SmallShuffleNetV1Config(PreTrainedConfig):
    """Sizes of a ShuffleNet; the defaults are those of three groups.

    Args:
        depths: blocks of each of the three stages.
        widths: channels of the stem and of the stages.
        groups: of the 1×1 convolutions.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_small_shufflenetv1"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (4, 8, 4),
        widths: tuple[int, ...] | list[int] = (24, 240, 480, 960),
        groups: int = 3,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.widths = list(widths)
        self.groups = groups
        self.image_size = image_size
        super().__init__(**kwargs)


class Block(nn.Module):
    """Grouped 1×1, 3×3 of each channel, grouped 1×1; with stride 2 the pooled input is appended, else it is added.

    Args:
        inputs: channels of the input.
        outputs: channels of the branch.
        stride: 1 or 2.
        groups: of the first and of the last convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: tuple[int, int]) -> None:
        super().__init__()
        middle = outputs // 4
        self.appends = stride == 2
        self.groups = groups[0]
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=groups[0], bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups[1], bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H/stride, W/stride]``."""
        branch = shuffle(functional.relu(self.bn1(self.conv1(features))), self.groups)
        branch = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(branch)))))
        if self.appends:
            return self.relu(torch.cat((branch, functional.avg_pool2d(features, 3, 2, 1)), 1))
        return self.relu(branch + features)


class SmallShuffleNetV1(StagedNetwork):
    """The network, built from a :class:`SmallShuffleNetV1Config`."""

    classifier_path = "linear"

    def __init__(self, config: SmallShuffleNetV1Config) -> None:
        super().__init__(config)
        stem, *widths = config.widths
        self.conv1 = nn.Conv2d(3, stem, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        inputs = stem
        for number, (depth, width) in enumerate(zip(config.depths, widths, strict=True), 1):
            first_groups = 1 if number == 1 else config.groups
            blocks = [Block(inputs, width - inputs, 2, (first_groups, config.groups))]
            blocks += [Block(width, width, 1, (config.groups, config.groups)) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            last = f"layer{number}.{depth - 1}"
            norm = f"{last}.bn3" if depth > 1 else None  # of all channels only where the block adds its input
            self.add_stage(f"layer{number}", width, 2**number, f"{last}.relu", norm)
            inputs = width
        self.linear = nn.Linear(inputs, self.num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        features = self.relu(self.bn1(self.conv1(pixels)))
        for stage in self.feature_info:
            features = self.run_stage(self.get_submodule(stage["module"]), features)
        return self.linear(features.mean((2, 3)))


class SmallShuffleNetV1ForImageClassification(StagedForImageClassification):
    """The network as transformers holds it."""

    config_class = SmallShuffleNetV1Config
    network_class = SmallShuffleNetV1


SmallShuffleNetV1Config.register_for_auto_class()
SmallShuffleNetV1ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
