"""Wide ResNet for 32-pixel images, as a network and as a transformers model.

This file and staged.py are copied into every artefact of the network and run there without this package: they need
torch and transformers only. Its parameters have the names of RepDistiller and mdistiller.

Sergey Zagoruyko, Nikos Komodakis: Wide Residual Networks (BMVC 2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .staged import StagedForImageClassification, StagedNetwork, normal_fan_out


class WideResNetConfig(PreTrainedConfig):
    """Sizes of a Wide ResNet; the defaults are those of WRN-16-2.

    Args:
        depths: blocks of each of the three groups, (layers - 4) / 6.
        widths: channels of the stem and of the groups.
        norms_count_twice: in training, let the statistics of the BatchNorm behind each group move twice a step, as
            mdistiller's do: to read a group before its activation it passes the group through that layer again.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_wide_resnet"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (2, 2, 2),
        widths: tuple[int, ...] | list[int] = (16, 32, 64, 128),
        norms_count_twice: bool = False,
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.widths = list(widths)
        self.norms_count_twice = norms_count_twice
        self.image_size = image_size
        super().__init__(**kwargs)


class Block(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H/stride, W/stride]``, a sum that no activation follows."""
        active = self.relu1(self.bn1(features))
        shortcut = features if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(active))))


class Group(nn.Module):
    """Blocks in a row."""

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        sizes = [(inputs, stride)] + [(outputs, 1)] * (depth - 1)
        self.layer = nn.Sequential(*(Block(width, outputs, step) for width, step in sizes))

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H/stride, W/stride]``."""
        return self.layer(features)


class WideResNet(StagedNetwork):
    """The network, built from a :class:`WideResNetConfig`. Its stages are sums without BatchNorm or activation.

    A stage "before its activation" is the output of the BatchNorm that comes next, in the group that follows.
    """

    classifier_path = "fc"

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, config.widths[0], 3, 1, 1, bias=False)
        steps = ("block2.layer.0.relu1", "block3.layer.0.relu1", "relu")
        norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        for index, (depth, act, norm) in enumerate(zip(config.depths, steps, norms, strict=True)):
            inputs, outputs = config.widths[index : index + 2]
            self.add_module(f"block{index + 1}", Group(depth, inputs, outputs, 1 if index == 0 else 2))
            self.add_stage(f"block{index + 1}", outputs, 2**index, act, norm)
        self.bn1 = nn.BatchNorm2d(config.widths[-1])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(config.widths[-1], self.num_classes)
        normal_fan_out(self.modules())
        nn.init.zeros_(self.fc.bias)
        self.norms_count_twice = config.norms_count_twice

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        features = self.conv1(pixels)
        for stage in self.feature_info:
            features = self.run_stage(self.get_submodule(stage["module"]), features)
            if self.norms_count_twice and self.training:
                with torch.no_grad():
                    self.get_submodule(stage["norm"])(features)
        return self.fc(self.relu(self.bn1(features)).mean((2, 3)))


class WideResNetForImageClassification(StagedForImageClassification):
    """The network as transformers holds it."""

    config_class = WideResNetConfig
    network_class = WideResNet


WideResNetConfig.register_for_auto_class()
WideResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
