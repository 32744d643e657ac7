"""What the networks for 32-pixel images share: their facts, and how transformers holds them.

This file is copied into every artefact of such a network, beside the file that defines it, and runs there without this
package: it needs torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class StagedNetwork(nn.Module):
    """A convolutional network of stages that carries the facts which timm's networks carry.

    Args:
        config: with ``num_labels`` and ``image_size``.
    """

    classifier_path: ClassVar[str]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_labels or 0
        size = getattr(config, "image_size", 32)
        self.pretrained_cfg = {"classifier": self.classifier_path, "input_size": (3, size, size)}
        self.feature_info: list[dict[str, Any]] = []
        self.grad_checkpointing = False

    def add_stage(self, module: str, channels: int, reduction: int, act: str | None, norm: str | None) -> None:
        """Note a stage.

        Args:
            module: path of the module whose output it is.
            channels: C of it.
            reduction: pixels of the image per pixel of it, along a side.
            act: path of the activation whose input is the stage before its last activation.
            norm: path of the BatchNorm before that.
        """
        facts = {"module": module, "num_chs": channels, "reduction": reduction, "act": act, "norm": norm}
        self.feature_info.append(facts)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def run_stage(self, stage: nn.Module, features: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H', W']``, to be run again in the backward pass if that was asked for."""
        if self.grad_checkpointing and self.training:
            return checkpoint(stage, features, use_reentrant=False)
        return stage(features)


def shuffle(features: Tensor, groups: int) -> Tensor:
    """``[B, C, H, W]`` with the channels of the groups taken in turns: the first of each, the second of each, …"""
    return features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def normal_fan_out(modules: Iterable[nn.Module]) -> None:
    """Convolutions from N(0, 2 / (k² · output channels)), of the groups together, with biases of 0."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class StagedForImageClassification(PreTrainedModel):
    """A network as transformers holds it; subclasses say which."""

    base_model_prefix = "network"
    main_input_name = "pixel_values"
    network_class: ClassVar[type[StagedNetwork]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.network = self.network_class(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits ``[B, K]`` of ``[B, 3, H, W]``, and the cross-entropy when labels ``[B]`` are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
