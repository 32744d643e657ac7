"""torchvision's ShuffleNetV2 as a network and as a transformers model; timm has none.

This file is copied into every artefact of the network and runs there without this package: it needs torch, torchvision,
timm and transformers only.

Ningning Ma et al.: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (ECCV 2018).
"""

from __future__ import annotations

from typing import Any

from timm.models import checkpoint_seq
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class ShuffleNetV2Config(PreTrainedConfig):
    """Sizes of a ShuffleNetV2; the defaults are those of 1×.

    Args:
        depths: blocks of each of the three stages.
        widths: channels of the stem, of the three stages, and of the 1×1 convolution behind them.
        image_size: pixels per side that it is meant for; any size works.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_shufflenetv2"

    def __init__(
        self,
        depths: tuple[int, ...] | list[int] = (4, 8, 4),
        widths: tuple[int, ...] | list[int] = (24, 116, 232, 464, 1024),
        image_size: int = 224,
        **kwargs: Any,
    ) -> None:
        self.depths = list(depths)
        self.widths = list(widths)
        self.image_size = image_size
        super().__init__(**kwargs)


class ShuffleNet(ShuffleNetV2):
    """torchvision's network, built from a :class:`ShuffleNetV2Config`, with the facts that timm's networks carry."""

    def __init__(self, config: ShuffleNetV2Config) -> None:
        super().__init__(config.depths, config.widths, num_classes=config.num_labels or 0)
        self.config = config
        self.num_classes = config.num_labels or 0
        self.grad_checkpointing = False
        self.pretrained_cfg = {"classifier": "fc", "input_size": (3, config.image_size, config.image_size)}
        self.feature_info = [
            {"module": f"stage{index}", "num_chs": width, "reduction": 2 ** (index + 1)}
            for index, width in zip((2, 3, 4), config.widths[1:4], strict=True)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, K]``."""
        features = self.maxpool(self.conv1(pixels))
        stages = nn.Sequential(self.stage2, self.stage3, self.stage4)
        recompute = self.grad_checkpointing and self.training
        features = checkpoint_seq(stages, features) if recompute else stages(features)
        return self.fc(self.conv5(features).mean((2, 3)))


class ShuffleNetV2ForImageClassification(PreTrainedModel):
    """The network as transformers holds it."""

    config_class = ShuffleNetV2Config
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: ShuffleNetV2Config) -> None:
        super().__init__(config)
        self.network = ShuffleNet(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits ``[B, K]`` of ``[B, 3, H, W]``, and the cross-entropy when labels ``[B]`` are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


ShuffleNetV2Config.register_for_auto_class()
ShuffleNetV2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
