"""Teachers whole and sharded, as one of several processes sees them; then training runs.

``torchrun … -m tests.programs.sharded_teachers FOLDER RECIPE …``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from kd_hf.distillation.teacher import Teacher
from kd_hf.models.load import load_model
from kd_hf.models.taps import TappedModel
from kd_hf.outputs import Outputs
from kd_hf.process import build_accelerator
from kd_hf.recipe.config import TeacherConfig, TrainConfig
from kd_hf.train.__main__ import main as train

SIZE = 64
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "test_vit": ({}, ("block:0", "block:-1", "tokens:patch", "pre_logits", "module:blocks.0.attn")),
    "test_resnet": ({}, ("stage:1", "stage:-1", "pre_logits")),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4},
        ("stage:1", "stage:-1", "tokens"),
    ),
}


def outputs_of(name: str, shard: bool, mode: str = "eval") -> tuple[Outputs, Teacher]:
    """One pass of a teacher with fixed weights over fixed images."""
    kwargs, taps = NETWORKS[name]
    torch.manual_seed(0)
    handle = load_model(name, pretrained=False, num_classes=10, image_size=SIZE, kwargs=kwargs)
    cfg = TeacherConfig(model=name, shard=shard, mode=mode)
    tapped = TappedModel(handle, handle.info, taps)
    teacher = Teacher("teacher", cfg, handle, tapped, torch.device("cpu"), TrainConfig(output_dir="."))
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    teacher(pixels)  # twice: what a pass leaves behind must not change the next
    return teacher(pixels), teacher


def compare(name: str) -> dict[str, Any]:
    """Largest relative difference of logits and taps, kinds of tensors, and the part of the weights held here."""
    (whole, plain), (parts, sharded) = outputs_of(name, shard=False), outputs_of(name, shard=True)
    pairs = [(whole.logits, parts.logits), *((whole.taps[tap], parts.taps[tap]) for tap in whole.taps)]
    parameters = list(sharded.model.parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return {
        "difference": max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs),
        "plain": not any(isinstance(found, DTensor) or found.requires_grad for _, found in pairs),
        "share": held / sum(p.numel() for p in plain.model.parameters()),
    }


def main(folder: str, *recipes: str) -> None:
    rank = build_accelerator(TrainConfig(output_dir=folder, use_cpu=True)).process_index
    found = {name: compare(name) for name in NETWORKS}
    (Path(folder) / f"teachers-{rank}.json").write_text(json.dumps(found))
    for recipe in recipes:
        train([recipe])


if __name__ == "__main__":
    main(*sys.argv[1:])
