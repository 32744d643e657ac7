"""VGG with BatchNorm for 32-pixel images, as a network and as a transformers model.

This file and staged.py are copied into every artefact of the network and run there without this package: they need
torch and transformers only. Its parameters have the names of RepDistiller and mdistiller.

Karen Simonyan, Andrew Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition (ICLR 2015).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from .staged import StagedForImageClassification, StagedNetwork, normal_fan_out

POOLED_BLOCKS = 3  # halved in size behind them; a fourth where images have LARGE pixels
LARGE = 64


class SmallVggConfig(PreTrainedConfig):
    """Sizes of a VGG in five blocks; the defaults are those of VGG-8.

    Args:
        depths: convolutions of each block.
        widths: channels of each block.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_small_vgg"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (1, 1, 1, 1, 1),
        widths: tuple[int, ...] | list[int] = (64, 128, 256, 512, 512),
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.widths = list(widths)
        self.image_size = image_size
        super().__init__(**kwargs)


class SmallVgg(StagedNetwork):
    """The network, built from a :class:`SmallVggConfig`. The first block is its stem, the other four are its stages."""

    classifier_path = "classifier"

    def __init__(self, config: SmallVggConfig) -> None:
        super().__init__(config)
        inputs = 3
        for index, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            self.add_module(f"block{index}", nn.Sequential(*layers))
            if index:
                act, norm = f"block{index}.{3 * depth - 1}", f"block{index}.{3 * depth - 2}"
                self.add_stage(f"block{index}", width, 2 ** min(index, POOLED_BLOCKS), act, norm)
        self.classifier = nn.Linear(inputs, self.num_classes)
        normal_fan_out(self.modules())
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        pooled = POOLED_BLOCKS + (pixels.shape[-2] == LARGE)
        features = pixels
        for index in range(len(self.feature_info) + 1):
            features = self.run_stage(self.get_submodule(f"block{index}"), features)
            if index < pooled:
                features = functional.max_pool2d(features, 2)
        return self.classifier(features.mean((2, 3)))


class SmallVggForImageClassification(StagedForImageClassification):
    """The network as transformers holds it."""

    config_class = SmallVggConfig
    network_class = SmallVgg


SmallVggConfig.register_for_auto_class()
SmallVggForImageClassification.register_for_auto_class("AutoModelForImageClassification")
