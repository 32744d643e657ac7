"""Pure functions that several methods share. Every one works on full-precision logits and stays finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when float64: losses must not suffer from autocast."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def frozen(tensor: Tensor) -> Tensor:
    """A teacher's tensor in full precision and without gradient."""
    return full_precision(tensor.detach())


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``-T² Σ_k q_k log p_k`` per sample with p, q the softmax of logits / T: ``[B, K], [B, K] → [B]``."""
    rows = F.softmax(teacher / temperature, dim=1)
    return F.cross_entropy(student / temperature, rows, reduction="none") * temperature**2


# A removed class: its exponential is exactly 0 and, unlike with -inf, so is 0 times its logarithm.
REMOVED = -1e30


def without(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits ``[B, K]`` in which softmax and log-sum-exp run over the classes other than the indices ``[B, J]``.

    This is exact where ``log(1 - p)`` would overflow because p rounds to 1.
    """
    return logits.scatter(1, classes, REMOVED)


def rest_cross_entropy(logits: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
    """``-Σ_{k∉classes} rows_k log p̂_k`` per sample, p̂ the softmax over the classes not in `classes`.

    Args:
        logits: ``[B, K]``.
        classes: the removed class indices ``[B, J]``.
        rows: weights ``[B, K]`` that are 0 at `classes` and sum to 1.

    Returns:
        ``[B]``.
    """
    return F.cross_entropy(without(logits, classes), rows, reduction="none")


def labelled(hard: Tensor) -> tuple[Tensor, Tensor]:
    """Split labels ``[B]`` into a valid index for every sample and a mask that is False where it was -1."""
    return hard.clamp(min=0), hard >= 0


def batch_mean(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sum of per-sample values ``[B]`` over B. Samples not `counted` add 0 but stay in B.

    Dividing by B and not by the number counted makes the mean over equal slices of a batch the whole batch's.
    """
    if counted is not None:
        values = values.masked_fill(~counted, 0.0)
    return values.sum() / len(values)


def exact(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device, for sums and products that bfloat16 would spoil."""
    return torch.autocast(tensor.device.type, enabled=False)


def unit(tensor: Tensor) -> Tensor:
    """Vectors along the last axis in full precision and of length 1 (0 where shorter than 1e-12)."""
    return F.normalize(full_precision(tensor), dim=-1)


class _GramDifference(torch.autograd.Function):
    """Mean of Δ² with Δ = TTᵀ - SSᵀ and its gradient -4 ΔS / count, so that no Gram matrix outlives the forward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        delta = torch.bmm(teacher, teacher.transpose(1, 2))  # [G, R, R]
        delta.baddbmm_(student, student.transpose(1, 2), alpha=-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.bmm(delta, student).mul_(-4 / delta.numel()))
        flat = delta.flatten()
        return flat.dot(flat) / len(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


def gram_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of Gram matrices, ``mean (T Tᵀ - S Sᵀ)²``, over groups and pairs of rows.

    With unit rows the entries are cosines, so the widths need not agree.

    Args:
        student: ``[G, R, D_s]``, in full precision.
        teacher: ``[G, R, D_t]``, of the same type; no gradient reaches it.

    Returns:
        A scalar that can be differentiated once.
    """
    with exact(student):
        return _GramDifference.apply(student, teacher.detach())
