"""Exact sums over an evaluation set: every sample counts once, on any number of ranks and with padded batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ClassificationMeter:
    """Top-1, top-5 and, beside a teacher, agreement: counts on the device, fetched once.

    Args:
        device: where the counts live.
    """

    names = ("top1", "top5", "agreement", "labelled", "compared")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.names), dtype=torch.int64, device=device)

    def update(self, logits: Tensor, label: Tensor, valid: Tensor, teacher_class: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: ``[B, K]``.
            label: int64 ``[B]``, -1 where unknown.
            valid: bool ``[B]``, false for padding and unreadable images.
            teacher_class: int64 ``[B]``, the teacher's first choice.
        """
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        hits = (ranked == label[:, None]) & valid[:, None]
        known = valid & (label >= 0)
        agree = (ranked[:, 0] == teacher_class) & valid if teacher_class is not None else torch.zeros_like(valid)
        compared = valid if teacher_class is not None else torch.zeros_like(valid)
        counts = (hits[:, 0], hits.any(1), agree, known, compared)
        self.sums += torch.stack([count.sum() for count in counts])

    def compute(self, reduce_sum: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, float]:
        """Percentages over all ranks; `reduce_sum` adds a tensor over ranks. Absent quantities are left out."""
        top1, top5, agreement, labelled, compared = reduce_sum(self.sums).tolist()
        values: dict[str, float] = {}
        if labelled:
            values |= {"top1": 100.0 * top1 / labelled, "top5": 100.0 * top5 / labelled}
        if compared:
            values["agreement"] = 100.0 * agreement / compared
        values["samples"] = float(max(labelled, compared))
        return values
