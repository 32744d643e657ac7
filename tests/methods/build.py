"""Short ways to build a method and its inputs."""

from __future__ import annotations

import torch

from kd_hf.info import Shapes
from kd_hf.outputs import Outputs, Target


def build(method, classes=7, student=None, teacher=None, **config):
    """A method with tapped shapes by role, in float64."""
    shapes = [Shapes(classes, taps or {}) for taps in (student, teacher)]
    return method(method.Config(**config), *shapes, {}).double()


def logits(rows=5, classes=7, seed=0, scale=3.0):
    """Random float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)


def run(method, student, teacher=None, label=None, soft=None, draws=None, taps=None, dist=None):
    """Losses for plain logits ``[B, K]``."""
    label = torch.full((len(student),), -1) if label is None else torch.as_tensor(label)
    outputs = Outputs(student, dist, taps or {})
    return method(outputs, None if teacher is None else Outputs(teacher), Target(label, soft), draws or {})
