"""Detectors of every known architecture with a few ten thousand weights, and images with objects for them."""

from __future__ import annotations

import torch

from kd_hf.detection.data.stage import BoxTarget, Images
from kd_hf.detection.networks.detector import TappedDetector
from kd_hf.detection.networks.load import load_detector

QUERIES, CLASSES = 7, 5
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 12, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
_LEVELS = {"out_features": ["stage2", "stage3", "stage4"]}
_RT_RESNET = {**_RESNET, **_LEVELS, "model_type": "rt_detr_resnet", "hidden_sizes": [8, 12, 16, 20]}
_HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 12, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 12, 16, 20],
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "embedding_size": 8,
    **_LEVELS,
}
_ENCODER = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
_DECODER = {"decoder_layers": 3, "decoder_ffn_dim": 16, "num_queries": QUERIES}
_HEADS = {"decoder_attention_heads": 2}
_DETR = {**_ENCODER, **_DECODER, **_HEADS, "d_model": 16, "dropout": 0.0}
_PLAIN = {"backbone_config": _RESNET, "auxiliary_loss": True, **_DETR}
_RT = {
    **_DETR,
    "backbone_config": _RT_RESNET,
    "encoder_in_channels": [12, 16, 20],
    "encoder_hidden_dim": 16,
    "decoder_in_channels": [16, 16, 16],
    "num_denoising": 4,
    "decoder_n_points": 2,
}
_VIT = {"image_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
_VIT |= {"window_block_indices": [0], "out_indices": [1, 2]}
_LW = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "c2f_num_blocks": 1, "dropout": 0.0}
_LW |= {"group_detr": 2, "decoder_n_points": 2, "d_model": 16, **_DECODER}
_DAB = {key: value for key, value in _PLAIN.items() if key != "d_model"}

TINY = {
    "detr": _PLAIN,
    "table-transformer": _PLAIN,
    "conditional_detr": _PLAIN,
    "dab-detr": {**_DAB, "hidden_size": 16},
    "deformable_detr": {
        **_PLAIN,
        "backbone_config": {**_RESNET, **_LEVELS},
        "d_model": 32,
        "num_feature_levels": 4,
        "with_box_refine": True,
        "decoder_n_points": 2,
        "encoder_n_points": 2,
    },
    "rt_detr": _RT,
    "rt_detr_v2": _RT,
    "d_fine": {**_RT, "backbone_config": _HGNET, "lqe_hidden_dim": 8, "top_prob_values": 2, "max_num_bins": 8},
    "lw_detr": {
        **_LW,
        "backbone_config": {**_VIT, "model_type": "lw_detr_vit", "num_windows": 4, "pretrain_image_size": 64},
        "projector_scale_factors": [2.0, 0.5],
    },
    "rf_detr": {**_LW, "backbone_config": {**_VIT, "model_type": "rf_detr_dinov2", "num_windows": 2}},
    "yolos": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [64, 96],
        "patch_size": 16,
        "num_detection_tokens": QUERIES,
        "hidden_dropout_prob": 0.0,
    },
    "kd_hf_vidt": {
        "embed_dim": 8,
        "depths": (1, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "window_size": 3,
        "num_queries": QUERIES,
        "d_model": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 16,
        "decoder_n_points": 2,
        "dropout": 0.0,
    },
}


def handle(kind, device=None, seed=0, **options):
    torch.manual_seed(seed)
    return load_detector(f"transformers/{kind}", num_classes=CLASSES, kwargs={**TINY[kind], **options}, device=device)


def detector(kind, taps=(), seed=0, **options):
    """With weights spread a little, so that queries differ."""
    made = handle(kind, seed=seed, **options)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return TappedDetector(made, made.info, taps)


def images(sizes=((64, 96), (48, 64), (64, 32)), frame=(64, 96), seed=1):
    torch.manual_seed(seed)
    mask = torch.ones(len(sizes), *frame, dtype=torch.bool)
    for row, (height, width) in zip(mask, sizes, strict=True):
        row[:height, :width] = False
    return Images(torch.randn(len(sizes), 3, *frame).masked_fill(mask[:, None], 0), mask)


def objects(counts=(2, 1, 0), seed=2):
    torch.manual_seed(seed)
    boxes = [torch.cat([0.3 + 0.4 * torch.rand(n, 2), 0.2 + 0.3 * torch.rand(n, 2)], 1) for n in counts]
    return BoxTarget([torch.randint(0, CLASSES, (n,)) for n in counts], boxes)
