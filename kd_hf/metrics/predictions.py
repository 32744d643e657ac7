"""Logits of one network over a whole evaluation set, gathered over ranks: for `predict` and `compute_metrics`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from kd_hf.data.batch import Batch


class EvalPrediction(NamedTuple):
    """What `compute_metrics` is given, under transformers' names."""

    predictions: np.ndarray
    """float32 ``[N, K]``: logits, in the order of the images."""
    label_ids: np.ndarray
    """int64 ``[N]``; -1 where there is no label."""


class PredictionOutput(NamedTuple):
    """What `predict` returns, under transformers' names."""

    predictions: np.ndarray
    label_ids: np.ndarray
    metrics: dict[str, float]


class Predictions:
    """Collects the logits of a network batch by batch."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Keep the logits ``[B, K]`` of a batch; padding and unreadable images are marked."""
        row = torch.where(batch.valid, batch.row, -1)
        self._parts.append((row, batch.label, logits.detach().float()))

    def gather(self, accelerator: Accelerator) -> EvalPrediction:
        """Every image once, in the order of the set; a call of all ranks, each of which gets the whole."""
        row, label, logits = (accelerator.gather(torch.cat(part)).cpu() for part in zip(*self._parts, strict=True))
        order = torch.argsort(row, stable=True)
        order = order[row[order] >= 0]
        return EvalPrediction(logits[order].numpy(), label[order].numpy())
