"""ViDT, a detector of transformers only: Swin with [DET] tokens, a deformable decoder without encoder, box heads.

This file and those it imports are copied into every artefact of the network and run there without this package: they
need torch, torchvision, transformers and scipy only.

Hwanjun Song et al.: ViDT: An Efficient and Effective Fully Transformer-based Object Detector (ICLR 2022), and
An Extendable, Efficient and Effective Transformer-based Object Detector (2022) for the options called ViDT+.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deformable_detr.modeling_deformable_detr import inverse_sigmoid
from transformers.utils import ModelOutput

from .vidt_body import RamSwin, resize_mask
from .vidt_config import ViDTConfig
from .vidt_losses import detection_loss
from .vidt_neck import ClassHead, DecoderLayer, MlpHead, Projection, PyramidFusion, TokenClassifier


@dataclass
class ViDTOutput(ModelOutput):
    """What a pass gives; S = L + 1 predictions, D the neck's width.

    Attributes:
        loss: the weighted sum, when labels were given.
        loss_dict: its parts.
        logits: ``[B, Q, K]`` of the last prediction; each class has a sigmoid of its own.
        pred_boxes: ``[B, Q, 4]`` centre, width and height, relative to the image without padding; full precision.
        auxiliary_outputs: the S - 1 predictions before the last, each a dict of the same names.
        pred_ious: ``[B, Q, 1]`` logits of each box's overlap, when ``iou_aware``.
        pred_vectors: ``[B, Q, mask_vector]``, when the network predicts masks.
        token_logits: ``[B, H, W, K]`` of each level, when ``token_label``.
        patch_tokens: the decoder's memory, ``[B, D, H, W]`` of each level.
        patch_masks: bool ``[B, H, W]`` of each level, True where a token is of the image.
        body_tokens: ``[B, Q, D]``: the [DET] tokens that enter the decoder.
        neck_tokens: ``[B, S, Q, D]``: the same and what each decoder layer makes of them.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    pred_ious: Tensor | None = None
    pred_vectors: Tensor | None = None
    token_logits: tuple[Tensor, ...] | None = None
    patch_tokens: tuple[Tensor, ...] | None = None
    patch_masks: tuple[Tensor, ...] | None = None
    body_tokens: Tensor | None = None
    neck_tokens: Tensor | None = None


class ViDTForObjectDetection(PreTrainedModel):
    """The detector as transformers holds it."""

    config: ViDTConfig
    config_class = ViDTConfig
    base_model_prefix = "vidt"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: ViDTConfig) -> None:
        super().__init__(config)
        width, classes = config.d_model, config.num_labels or 0
        self.backbone = RamSwin(config)
        if config.fusion:
            self.fusion = PyramidFusion(config.level_widths, width)
        else:
            self.input_proj = nn.ModuleList(Projection(inputs, width) for inputs in config.level_widths)
        self.tgt_proj = Projection(config.stage_widths[-1], width)
        self.query_pos_proj = Projection(width, width)
        self.reference_points = nn.Linear(width, 2)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        # without refinement all predictions share their heads
        heads = config.decoder_layers + 1 if config.with_box_refine else 1
        self.class_embed = nn.ModuleList(ClassHead(width, classes) for _ in range(heads))
        self.bbox_embed = nn.ModuleList(
            MlpHead(width, 4, (0.0, 0.0, -2.0, -2.0) if number == 0 else (0.0,) * 4) for number in range(heads)
        )
        if config.iou_aware:
            self.iou_embed = nn.ModuleList(MlpHead(width, 1) for _ in range(heads))
        if config.mask_vector:
            self.vector_embed = MlpHead(width, config.mask_vector, (0.0,) * config.mask_vector)
        if config.token_label:
            self.token_head = TokenClassifier(width, classes)
        self._no_split_modules = {"RamBlock", "DecoderLayer"}
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over parts of foreign code without parameters of their own; ours know loaded weights
        super()._initialize_weights(module, False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise = getattr(module, "initialise", None)
        if initialise is not None:
            initialise()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> ViDTOutput:
        """Detect objects.

        Args:
            pixel_values: ``[B, 3, H, W]``, images of several sizes filled up on the right and below.
            pixel_mask: ``[B, H, W]``, 1 where a pixel is of the image; by default all are.
            labels: for each image ``class_labels`` and ``boxes``; see ``vidt_losses.detection_loss``.
            kwargs: what transformers passes to every model.
        """
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(len(pixel_values), *pixel_values.shape[-2:])
        padding = ~pixel_mask.bool()
        maps, tokens = self.backbone(pixel_values.to(self.dtype), padding)
        memory = self._memory(maps)
        valid = [~resize_mask(padding, level.shape[-2:]) for level in memory]
        body_tokens = self.tgt_proj.tokens(tokens)
        states, boxes = self._decode(memory, valid, body_tokens)
        *auxiliary, last = self._predict(states, boxes)
        predictions: dict[str, Any] = {**last, "auxiliary_outputs": auxiliary}
        if self.config.token_label:
            predictions["token_logits"] = self.token_head(memory, valid)
        loss, parts = (None, None) if labels is None else self._loss(predictions, labels)
        return ViDTOutput(
            loss=loss,
            loss_dict=parts,
            **predictions,
            patch_tokens=tuple(memory),
            patch_masks=tuple(valid),
            body_tokens=body_tokens,
            neck_tokens=torch.stack(states, 1),
        )

    def _memory(self, maps: list[Tensor]) -> list[Tensor]:
        if self.config.fusion:
            fused: list[Tensor] = self.fusion(maps)
            return fused
        return [proj(level) for proj, level in zip(self.input_proj, maps, strict=True)]

    def _decode(self, memory: list[Tensor], valid: list[Tensor], tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The tokens ``[B, Q, D]`` before and behind every layer, and the box ``[B, Q, 4]`` that each gives."""
        positions = self.query_pos_proj.tokens(self.backbone.det_pos_embed).expand(len(tokens), -1, -1)
        sizes = [tuple(level.shape[-2:]) for level in memory]
        shapes = torch.tensor(sizes, device=tokens.device)
        starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
        flat = torch.cat([level.flatten(2).transpose(1, 2) for level in memory], 1)
        seen = torch.cat([mask.flatten(1) for mask in valid], 1)
        ratios = torch.stack([_valid_ratio(mask) for mask in valid], 1)[:, None]  # [B, 1, levels, 2]
        reference = _full(self.reference_points(positions)).sigmoid()
        states, boxes = [tokens], [self._box(0, tokens, reference)]
        for number, layer in enumerate(self.decoder, 1):
            if self.config.with_box_refine:
                reference = boxes[-1].detach()
            places = reference[:, :, None] * ratios.repeat(1, 1, 1, reference.shape[-1] // 2)
            tokens = layer(tokens, positions, places, shapes, sizes, starts, flat, seen)
            states.append(tokens)
            boxes.append(self._box(number, tokens, reference))
        return states, boxes

    def _box(self, number: int, tokens: Tensor, reference: Tensor) -> Tensor:
        """Move a reference point ``[B, Q, 2]`` or box ``[B, Q, 4]``: the box in full precision."""
        change = _full(_at(self.bbox_embed, number)(tokens))
        known = inverse_sigmoid(reference)
        return (change + nn.functional.pad(known, (0, 4 - known.shape[-1]))).sigmoid()

    def _predict(self, states: list[Tensor], boxes: list[Tensor]) -> list[dict[str, Tensor]]:
        """All predictions in order."""
        predictions = []
        for number, (tokens, box) in enumerate(zip(states, boxes, strict=True)):
            prediction = {"logits": _at(self.class_embed, number)(tokens), "pred_boxes": box}
            if self.config.iou_aware:
                prediction["pred_ious"] = _at(self.iou_embed, number)(tokens)
            if self.config.mask_vector:
                prediction["pred_vectors"] = self.vector_embed(tokens)
            predictions.append(prediction)
        return predictions

    def _loss(
        self, predictions: Mapping[str, Any], labels: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        counted = dict(predictions)
        if not self.config.auxiliary_loss:
            counted["auxiliary_outputs"] = []
        return detection_loss(self.config, counted, labels)


def _full(tensor: Tensor) -> Tensor:
    """In float32, or as it is when float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _at(heads: nn.ModuleList, number: int) -> nn.Module:
    """The head of a prediction, or the one that all share."""
    return heads[number if len(heads) > 1 else 0]


def _valid_ratio(mask: Tensor) -> Tensor:
    """Which part of a map's width and height is of the image: bool ``[B, H, W] → [B, 2]``."""
    height, width = mask.shape[1:]
    return torch.stack([mask[:, 0].sum(1).float() / width, mask[:, :, 0].sum(1).float() / height], -1)


ViDTForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
