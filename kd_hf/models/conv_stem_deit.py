"""The distilled DeiT with a convolutional stem that VkD trains, as a network and as a transformers model.

This file is copied into every artefact of the network and runs there without this package: it needs torch, timm and
transformers only.

Roy Miles, Ismail Elezi, Jiankang Deng: VkD: Improving Knowledge Distillation using Orthogonal Projections (CVPR 2024).
The stem is the one of CiVT: Sucheng Ren et al.: Co-advise: Cross Inductive Bias Distillation (CVPR 2022).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

PATCH = 16  # pixels per token: stride 2 of the first convolution times stride 8 of the last
STEM_CHANNELS = 64


class ConvStemDeitConfig(PreTrainedConfig):
    """Sizes of a :class:`ConvStemDeit`; the defaults are those of the tiny one.

    Args:
        embed_dim: width C of the tokens.
        depth: number of transformer blocks.
        num_heads: attention heads per block.
        image_size: pixels per side, a multiple of 16.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_conv_stem_deit"

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.image_size = image_size
        self.drop_path_rate = drop_path_rate
        super().__init__(**kwargs)


class ConvStem(nn.Module):
    """Three convolutions with BatchNorm and ReLU at half resolution, then patches of 8×8 of that map."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for inputs, kernel, stride in ((3, 7, 2), (STEM_CHANNELS, 3, 1), (STEM_CHANNELS, 3, 1)):
            steps.append(nn.Conv2d(inputs, STEM_CHANNELS, kernel, stride, kernel // 2, bias=False))
            steps += [nn.BatchNorm2d(STEM_CHANNELS), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*steps)
        self.proj = nn.Conv2d(STEM_CHANNELS, embed_dim, PATCH // 2, PATCH // 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, N, C]`` with N = H/16 · W/16."""
        return self.proj(self.conv(pixels)).flatten(2).transpose(1, 2)


class ConvStemDeit(nn.Module):
    """A DeiT with a class and a distillation token, each with a classifier, over patches of a convolutional stem.

    The distillation token is not learned: it is the mean of the patch embeddings. The tokens are ordered class,
    distillation, patches, and each has its learned position. In train mode after ``set_distilled_training()`` the
    network gives the logits of both classifiers, else their mean. Parameters have the names of the authors' code.
    """

    prefix_tokens = ("cls", "dist")
    num_prefix_tokens = 2

    def __init__(self, config: ConvStemDeitConfig) -> None:
        super().__init__()
        width, size = config.embed_dim, config.image_size
        if size % PATCH:
            raise ValueError(f"image_size {size} is no multiple of {PATCH}")
        self.config = config
        self.num_classes = config.num_labels or 0
        self.pretrained_cfg = {"classifier": ("head", "head_dist"), "input_size": (3, size, size)}
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": width, "reduction": PATCH} for index in range(config.depth)
        ]
        self.distilled_training = self.grad_checkpointing = False
        self.conv_embed = ConvStem(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // PATCH) ** 2 + self.num_prefix_tokens, width))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        rates = [config.drop_path_rate * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.Sequential(
            *(Block(width, config.num_heads, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, self.num_classes)
        self.head_dist = nn.Linear(width, self.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give the logits of both classifiers apart in train mode, or their mean."""
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed, beside biases and norms."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions of timm's layer-wise groups: stem, blocks in order, final norm."""
        return {"stem": r"^cls_token|pos_embed|conv_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def forward_features(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W] → [B, 2 + N, C]``: the normalised tokens after the last block."""
        patches = self.conv_embed(pixels)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches.mean(1, keepdim=True), patches), 1)
        tokens = tokens + self.pos_embed
        recompute = self.grad_checkpointing and self.training
        return self.norm(checkpoint_seq(self.blocks, tokens) if recompute else self.blocks(tokens))

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``[B, 3, H, W] → [B, K]``, or a pair of those (class, distillation) in distilled training."""
        tokens = self.forward_features(pixels)
        logits, dist_logits = self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
        return (logits, dist_logits) if self.distilled_training and self.training else (logits + dist_logits) / 2


class ConvStemDeitForImageClassification(PreTrainedModel):
    """The network as transformers holds it; its logits are the mean of both classifiers."""

    config_class = ConvStemDeitConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: ConvStemDeitConfig) -> None:
        super().__init__(config)
        self.network = ConvStemDeit(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits ``[B, K]`` of ``[B, 3, H, W]``, and the cross-entropy when labels ``[B]`` are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


ConvStemDeitConfig.register_for_auto_class()
ConvStemDeitForImageClassification.register_for_auto_class("AutoModelForImageClassification")
