"""MLP-Mixer with any patch size, as a network and as a transformers model; timm's names fix the patch size at 16 or 32.

This file is copied into every artefact of the network and runs there without this package: it needs torch, timm and
transformers only.

Ilya Tolstikhin et al.: MLP-Mixer: An all-MLP Architecture for Vision (NeurIPS 2021). The defaults are the Mixer-B/14 of
Jiawei Fan et al.: ScaleKD: Strong Vision Transformers Could Be Excellent Teachers (NeurIPS 2024).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MlpMixerConfig(PreTrainedConfig):
    """Sizes of a Mixer; the defaults are those of B/14.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim: width C of the tokens; the channel MLP has 4 C hidden units, the token MLP C / 2.
        depth: number of blocks.
        image_size: pixels per side, a multiple of `patch_size`.
        drop_path_rate: stochastic depth, the same in every block.
        norm_eps: epsilon of every LayerNorm (ScaleKD's; timm's own Mixers have 1e-6).
        kwargs: what every configuration of transformers takes (``num_labels``, ``id2label``, …).
    """

    model_type = "kd_hf_mlp_mixer"

    def __init__(
        self,
        patch_size: int = 14,
        embed_dim: int = 768,
        depth: int = 12,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.image_size = image_size
        self.drop_path_rate = drop_path_rate
        self.norm_eps = norm_eps
        super().__init__(**kwargs)


class AnyPatchMixer(MlpMixer):
    """timm's MlpMixer, built from a :class:`MlpMixerConfig`."""

    def __init__(self, config: MlpMixerConfig) -> None:
        size, patch = config.image_size, config.patch_size
        if size % patch:
            raise ValueError(f"image_size {size} is no multiple of patch_size {patch}")
        norm: Any = partial(nn.LayerNorm, eps=config.norm_eps)
        super().__init__(
            num_classes=config.num_labels or 0,
            img_size=size,
            patch_size=patch,
            num_blocks=config.depth,
            embed_dim=config.embed_dim,
            norm_layer=norm,
            drop_path_rate=config.drop_path_rate,
        )
        self.config = config
        self.pretrained_cfg = {"classifier": "head", "input_size": (3, size, size)}


class MlpMixerForImageClassification(PreTrainedModel):
    """The network as transformers holds it."""

    config_class = MlpMixerConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: MlpMixerConfig) -> None:
        super().__init__(config)
        self.network = AnyPatchMixer(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits ``[B, K]`` of ``[B, 3, H, W]``, and the cross-entropy when labels ``[B]`` are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


MlpMixerConfig.register_for_auto_class()
MlpMixerForImageClassification.register_for_auto_class("AutoModelForImageClassification")
