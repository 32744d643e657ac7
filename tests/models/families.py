"""Tiny networks of many families, random and fast: (model, constructor arguments, image size)."""

from __future__ import annotations

from kd_hf.models.handle import ModelHandle
from kd_hf.models.load import load_model

VIT = {"depth": 3, "embed_dim": 32, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}

# a stack of equal blocks over one token sequence
TIMM_PLAIN = {
    "deit_tiny_patch16_224": (VIT, 32),
    "deit3_small_patch16_224": (VIT, 32),
    "deit_tiny_distilled_patch16_224": (VIT, 48),
    "vit_base_patch16_reg4_gap_256": (VIT, 32),
    "vit_relpos_small_patch16_224": (VIT, 32),
    "cait_xxs24_224": ({**VIT, "num_heads": 4}, 32),
    "xcit_nano_12_p16_224": ({**VIT, "num_heads": 4}, 32),
    "mixer_s32_224": ({}, 64),
    "eva02_tiny_patch14_224": (VIT, 28),
    "beit_base_patch16_224": (VIT, 32),
    "test_vit": ({}, 32),
    "test_vit2": ({}, 32),
    "test_vit3": ({}, 32),
}
# resolution levels
TIMM_PYRAMID = {
    "swin_tiny_patch4_window7_224": (SWIN, 64),
    "swinv2_tiny_window8_256": (SWIN, 64),
    "resnet18": ({}, 32),
    "resnet18d": ({}, 32),
    "test_resnet": ({}, 32),
    "regnety_002": ({}, 32),
    "convnext_atto": ({}, 32),
    "test_convnext": ({}, 32),
    "mobilenetv1_100": ({}, 32),
    "mobilenetv2_050": ({}, 32),
    "mobilenetv3_small_050": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "test_efficientnet": ({}, 32),
}

HF_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
}
HF_DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}
HF_TWO_HEADS = {**HF_VIT, "architectures": ["DeiTForImageClassificationWithTeacher"]}
HF_SWIN = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 2}
HF_LEVELS = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}

TRANSFORMERS_PLAIN = {
    "vit": ("transformers/vit", HF_VIT),
    "deit": ("transformers/deit", HF_VIT),
    "deit-two-heads": ("transformers/deit", HF_TWO_HEADS),
    "beit": ("transformers/beit", HF_VIT),
    "dinov2": ("transformers/dinov2", HF_DINO),
    "dinov2-registers": ("transformers/dinov2_with_registers", HF_DINO),
}
TRANSFORMERS_PYRAMID = {
    "swin": ("transformers/swin", HF_SWIN),
    "swinv2": ("transformers/swinv2", HF_SWIN),
    "resnet": ("transformers/resnet", {**HF_LEVELS, "embedding_size": 16}),
    "convnext": ("transformers/convnext", HF_LEVELS),
}


def tiny_timm(name: str, **more: object) -> tuple[ModelHandle, int]:
    kwargs, size = {**TIMM_PLAIN, **TIMM_PYRAMID}[name]
    return load_model(name, num_classes=5, image_size=size, kwargs={**kwargs, **more}), size


def tiny_transformers(key: str) -> ModelHandle:
    model, kwargs = {**TRANSFORMERS_PLAIN, **TRANSFORMERS_PYRAMID}[key]
    return load_model(model, num_classes=5, image_size=32, kwargs=kwargs)
