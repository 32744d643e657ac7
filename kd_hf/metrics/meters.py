"""Exact sums over an evaluation set: every sample counts once, on any number of ranks and with padded batches.

A meter adds on the device, without waiting for it, and is read once at the end. Counts are integers; other sums are
float64 where the device has it, so that the number of ranks and the size of the batches change the last digits at
most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ReduceSum = Callable[[Tensor], Tensor]  # adds a tensor over all ranks
BINS = 15  # of the calibration error
TOP = 5


def alone(value: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return value


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Scored:
    """What one network says about a batch, and what it is measured against.

    Logits of student and teacher have the same columns: the classes that may be chosen.
    """

    logits: Tensor
    """``[B, K]``."""
    label: Tensor
    """int64 ``[B]``, or ``[B, M]`` where several classes are right; -1 where there is none."""
    valid: Tensor
    """bool ``[B]``, false for padding and unreadable images."""
    teacher_class: Tensor | None = None
    """int64 ``[B]``: the teacher's first choice."""
    teacher_logits: Tensor | None = None
    """``[B, K]``."""
    features: Tensor | None = None
    """``[B, C]``, for CKA."""
    teacher_features: Tensor | None = None
    """``[B, C']``."""
    group: Tensor | None = None
    """int64 ``[B]``: class of the data, for accuracy by class; -1 where there is none."""


class Meter(ABC):
    """Sums over the images of an evaluation."""

    @abstractmethod
    def update(self, batch: Scored) -> None:
        """Add a batch."""

    @abstractmethod
    def compute(self, reduce_sum: ReduceSum = alone) -> dict[str, float]:
        """Values over all ranks; what was not measured is left out. Every rank must call it."""


class Accuracy(Meter):
    """``top1``, ``top5`` and, beside a teacher, ``agreement``, all in percent; ``samples`` that count for them.

    Agreement: how often both networks choose the same class first. Where several classes are right, one of them
    must be the first choice (among the first five).
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.int64, device=device)

    def update(self, batch: Scored) -> None:
        """Add a batch; `teacher_class` decides whether agreement is counted."""
        ranked = batch.logits.topk(min(TOP, batch.logits.shape[1]), dim=1).indices  # [B, 5]
        answers = _answers(batch.label)
        hits = (ranked[:, :, None] == answers[:, None, :]).any(2) & batch.valid[:, None]  # [B, 5]
        known = batch.valid & (answers >= 0).any(1)
        if batch.teacher_class is None:
            agree = compared = torch.zeros_like(batch.valid)
        else:
            agree, compared = (ranked[:, 0] == batch.teacher_class) & batch.valid, batch.valid
        self.sums += torch.stack([count.sum() for count in (hits[:, 0], hits.any(1), agree, known, compared)])

    def compute(self, reduce_sum: ReduceSum = alone) -> dict[str, float]:
        """See :class:`Meter`."""
        top1, top5, agreement, labelled, compared = reduce_sum(self.sums).tolist()
        values: dict[str, float] = {}
        if labelled:
            values |= {"top1": 100.0 * top1 / labelled, "top5": 100.0 * top5 / labelled}
        if compared:
            values["agreement"] = 100.0 * agreement / compared
        return values | {"samples": float(max(labelled, compared))}


class Calibration(Meter):
    """How far the probabilities p = softmax(logits) can be trusted, over images with one label y.

    ``nll``: mean of −log p_y, in nats. ``brier``: mean of Σ_k (p_k − [k = y])², from 0 to 2. ``ece``: expected
    calibration error in percent, 100 · Σ_b n_b/N · |accuracy_b − confidence_b| over 15 bins (0, 1/15], … of the
    first choice's probability.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = sum_dtype(device)
        self.sums = torch.zeros(2, dtype=dtype, device=device)  # nll, brier
        self.confidence = torch.zeros(BINS, dtype=dtype, device=device)
        self.counts = torch.zeros(BINS, 2, dtype=torch.int64, device=device)  # right, all

    def update(self, batch: Scored) -> None:
        """Add a batch; `label` is ``[B]``."""
        log_p = batch.logits.to(self.sums.dtype).log_softmax(1)
        p, label = log_p.exp(), batch.label.clamp(min=0)
        known = batch.valid & (batch.label >= 0)
        own = log_p.gather(1, label[:, None])[:, 0]
        brier = p.square().sum(1) - 2.0 * own.exp() + 1.0
        self.sums += torch.stack([torch.where(known, value, 0.0).sum() for value in (-own, brier)])
        confidence, choice = p.max(1)
        index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        self.confidence.index_add_(0, index, torch.where(known, confidence, 0.0))
        self.counts.index_add_(0, index, torch.stack([known & (choice == label), known], 1).long())

    def compute(self, reduce_sum: ReduceSum = alone) -> dict[str, float]:
        """See :class:`Meter`."""
        right, count = reduce_sum(self.counts).unbind(1)
        nll, brier = reduce_sum(self.sums).tolist()
        gap = (right - reduce_sum(self.confidence)).abs().sum().item()
        total = int(count.sum())
        return {"nll": nll / total, "ece": 100.0 * gap / total, "brier": brier / total} if total else {}


class Divergence(Meter):
    """``kl``: mean of KL(teacher ‖ student) = Σ_k t_k (log t_k − log s_k) at temperature 1, in nats."""

    def __init__(self, device: torch.device) -> None:
        self.sum = torch.zeros((), dtype=sum_dtype(device), device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, batch: Scored) -> None:
        """Add a batch, if it brings the teacher's logits."""
        if batch.teacher_logits is None:
            return
        teacher, student = (logits.to(self.sum.dtype).log_softmax(1) for logits in (batch.teacher_logits, batch.logits))
        divergence = (teacher.exp() * (teacher - student)).sum(1)
        self.sum += torch.where(batch.valid, divergence, 0.0).sum()
        self.count += batch.valid.sum()

    def compute(self, reduce_sum: ReduceSum = alone) -> dict[str, float]:
        """See :class:`Meter`."""
        total, count = reduce_sum(self.sum).item(), int(reduce_sum(self.count))
        return {"kl": total / count} if count else {}


class FeatureSimilarity(Meter):
    """``cka``: linear centred kernel alignment of both networks' features over all images, from 0 to 1.

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖), Frobenius norms, of features X ``[N, C]`` and Y ``[N, C']`` with their means
    taken off. The products are summed batch by batch and centred at the end: Xᵀ Y − N x̄ ȳᵀ. Paper: Similarity of
    Neural Network Representations Revisited, https://arxiv.org/abs/1905.00414
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.dtype = sum_dtype(device)
        self.sums: list[Tensor] = []  # Σx, Σy, XᵀX, YᵀY, YᵀX

    def update(self, batch: Scored) -> None:
        """Add a batch, if it brings the features of both networks."""
        if batch.features is None or batch.teacher_features is None:
            return
        x, y = (
            torch.where(batch.valid[:, None], values.to(self.dtype), 0.0)
            for values in (batch.features, batch.teacher_features)
        )
        products = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x]
        self.sums = [total + new for total, new in zip(self.sums, products, strict=True)] if self.sums else products
        self.count += batch.valid.sum()

    def compute(self, reduce_sum: ReduceSum = alone) -> dict[str, float]:
        """See :class:`Meter`."""
        if not self.sums:
            return {}
        count = reduce_sum(self.count).to(self.dtype).clamp(min=1)
        x, y, xx, yy, yx = (reduce_sum(value) for value in self.sums)
        xx, yy, yx = (product - torch.outer(a, b) / count for product, a, b in ((xx, x, x), (yy, y, y), (yx, y, x)))
        scale = (xx.norm() * yy.norm()).item()
        return {"cka": yx.square().sum().item() / scale} if scale > 0 else {}


class ByClass(Meter):
    """Right first choices and images of each class of the data; read by :meth:`counts`.

    Args:
        device: where the counts live.
        classes: of the data.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self.sums = torch.zeros(classes, 2, dtype=torch.int64, device=device)

    def update(self, batch: Scored) -> None:
        """Add a batch that brings the classes of its images."""
        if batch.group is None:
            return
        right = (batch.logits.argmax(1)[:, None] == _answers(batch.label)).any(1)
        known = batch.valid & (batch.group >= 0)
        self.sums.index_add_(0, batch.group.clamp(min=0), torch.stack([right & known, known], 1).long())

    def compute(self, reduce_sum: ReduceSum = alone) -> dict[str, float]:
        """``mean_class_top1``: the mean over classes of their accuracy, in percent."""
        shares = [right / count for right, count in self.counts(reduce_sum) if count]
        return {"mean_class_top1": 100.0 * sum(shares) / len(shares)} if shares else {}

    def counts(self, reduce_sum: ReduceSum = alone) -> list[tuple[int, int]]:
        """(right, all) of each class over all ranks."""
        return [(right, count) for right, count in reduce_sum(self.sums).tolist()]


def _answers(label: Tensor) -> Tensor:
    """Labels as int64 ``[B, M]``."""
    return label if label.ndim == 2 else label[:, None]
