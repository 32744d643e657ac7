"""Sizes and options of ViDT.

This file is copied into every artefact of the network and runs there without this package: it needs transformers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

# name → width of the first stage, blocks and heads of each stage, stochastic depth
BODIES: Mapping[str, tuple[int, tuple[int, ...], tuple[int, ...], float]] = {
    "swin_nano": (48, (2, 2, 6, 2), (3, 6, 12, 24), 0.0),
    "swin_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin_small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin_base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
    "swin_large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 0.3),
}


def body_sizes(name: str) -> dict[str, Any]:
    """Arguments of :class:`ViDTConfig` for one of :data:`BODIES`.

    Raises:
        ValueError: there is no body of that name.
    """
    if name not in BODIES:
        raise ValueError(f"ViDT has no body '{name}'; it has {', '.join(BODIES)}")
    embed_dim, depths, num_heads, drop_path_rate = BODIES[name]
    return {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "drop_path_rate": drop_path_rate}


class ViDTConfig(PreTrainedConfig):
    """Everything that decides the network and its loss; the defaults are ViDT with Swin-nano on COCO.

    Args:
        embed_dim: width C of the first stage; stage s has C·2ˢ.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        window_size: side of an attention window, in tokens.
        patch_size: pixels per token of the first stage.
        mlp_ratio: hidden width of the body's MLPs over their width.
        cross_stages: stages, counted from 0, in which the [DET] tokens read the image.
        num_queries: Q, the number of [DET] tokens and of boxes.
        d_model: D, width of the neck; a multiple of 32.
        decoder_layers: L; there are L + 1 predictions, the first from the body's tokens.
        decoder_attention_heads: heads of both attentions of a decoder layer.
        decoder_ffn_dim: hidden width of a decoder layer's MLP.
        decoder_n_points: samples per head and level.
        dropout: of the decoder.
        with_box_refine: each prediction corrects the box of the one before, and has heads of its own.
        fusion: merge the levels from coarse to fine before the decoder (ViDT+; EPFF).
        iou_aware: predict each box's overlap with its object as well (ViDT+).
        token_label: classify every memory token from the objects' masks (ViDT+).
        mask_vector: coefficients of each object's mask to predict (ViDT+, UQR: 256), or 0.
        mask_size: side of the square in which a mask's coefficients are taken.
        auxiliary_loss: every prediction counts, not the last alone.
        class_cost, bbox_cost, giou_cost: of matching.
        loss_weights: factor of each part where it is not ViDT's; see ``vidt_losses.WEIGHTS``.
        focal_alpha: α of the focal loss.
        num_labels: K; 91 for COCO's own category numbers.
        kwargs: what every configuration of transformers takes.
    """

    model_type = "kd_hf_vidt"

    def __init__(
        self,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        drop_path_rate: float = 0.0,
        window_size: int = 7,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        cross_stages: Sequence[int] = (3,),
        num_queries: int = 100,
        d_model: int = 256,
        decoder_layers: int = 6,
        decoder_attention_heads: int = 8,
        decoder_ffn_dim: int = 1024,
        decoder_n_points: int = 4,
        dropout: float = 0.1,
        with_box_refine: bool = True,
        fusion: bool = False,
        iou_aware: bool = False,
        token_label: bool = False,
        mask_vector: int = 0,
        mask_size: int = 128,
        auxiliary_loss: bool = True,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        loss_weights: Mapping[str, float] | None = None,
        focal_alpha: float = 0.25,
        num_labels: int = 91,
        **kwargs: Any,
    ) -> None:
        self.embed_dim = embed_dim
        self.depths = list(depths)
        self.num_heads = list(num_heads)
        self.drop_path_rate = drop_path_rate
        self.window_size = window_size
        self.patch_size = patch_size
        self.mlp_ratio = mlp_ratio
        self.cross_stages = list(cross_stages)
        self.num_queries = num_queries
        self.d_model = d_model
        self.decoder_layers = decoder_layers
        self.decoder_attention_heads = decoder_attention_heads
        self.decoder_ffn_dim = decoder_ffn_dim
        self.decoder_n_points = decoder_n_points
        self.dropout = dropout
        self.with_box_refine = with_box_refine
        self.fusion = fusion
        self.iou_aware = iou_aware
        self.token_label = token_label
        self.mask_vector = mask_vector
        self.mask_size = mask_size
        self.auxiliary_loss = auxiliary_loss
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.loss_weights = dict(loss_weights or {})
        self.focal_alpha = focal_alpha
        if "id2label" not in kwargs:
            kwargs["num_labels"] = num_labels
        super().__init__(**kwargs)

    @property
    def stage_widths(self) -> list[int]:
        """Channels of each stage of the body."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]

    @property
    def level_widths(self) -> list[int]:
        """Channels of the maps that the body gives: of every stage but the first, and of the last merged once more."""
        return [*self.stage_widths[1:], self.d_model]


ViDTConfig.register_for_auto_class()
