"""A ViDT of a few thousand weights, images of two sizes and their objects."""

from __future__ import annotations

import torch

from kd_hf.detection.networks.vidt import ViDTForObjectDetection
from kd_hf.detection.networks.vidt_config import ViDTConfig

PLUS = {"fusion": True, "iou_aware": True, "token_label": True, "mask_vector": 12, "mask_size": 8}
SIZES = ((52, 70), (64, 45))  # pixels of each image


def tiny_config(**options):
    sizes = {
        "embed_dim": 8,
        "depths": (1, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "window_size": 3,
        "num_queries": 6,
        "d_model": 64,  # two channels in each group of GroupNorm
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 16,
        "decoder_n_points": 2,
        "num_labels": 5,
        "dropout": 0.0,
    }
    return ViDTConfig(**{**sizes, **options})


def tiny_network(seed=0, **options):
    """Weights are spread so that every box is somewhere else and every part matters."""
    torch.manual_seed(seed)
    network = ViDTForObjectDetection(tiny_config(**options)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def batch(seed=1):
    """Pixels filled up with zeros, and the mask."""
    torch.manual_seed(seed)
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    pixels = torch.zeros(len(SIZES), 3, height, width, dtype=torch.float64)
    mask = torch.zeros(len(SIZES), height, width, dtype=torch.int64)
    for index, (rows, columns) in enumerate(SIZES):
        pixels[index, :, :rows, :columns] = torch.randn(3, rows, columns, dtype=torch.float64)
        mask[index, :rows, :columns] = 1
    return pixels, mask


def objects(counts=(3, 1), seed=2):
    """Labels of each image, with masks that fill most of the boxes."""
    torch.manual_seed(seed)
    labels = []
    for count, (rows, columns) in zip(counts, SIZES, strict=True):
        boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.2 + 0.3 * torch.rand(count, 2)], 1).double()
        masks = torch.zeros(count, rows, columns, dtype=torch.bool)
        for mask, (x, y, w, h) in zip(masks, boxes.tolist(), strict=True):
            top, left = int((y - h / 2) * rows), int((x - w / 2) * columns)
            mask[top : top + int(h * rows), left : left + int(w * columns) - 2] = True
        labels.append({"class_labels": torch.randint(1, 5, (count,)), "boxes": boxes, "masks": masks})
    return labels
