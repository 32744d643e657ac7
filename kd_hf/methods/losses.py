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


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits over a temperature; at 1, the usual case, they are left as they are, which saves two passes over them."""
    return logits if not isinstance(temperature, Tensor) and temperature == 1 else logits / temperature


def standardised(logits: Tensor) -> Tensor:
    """Z-scores over the classes, ``(z - mean) / (std + 1e-7)`` with the unbiased deviation, of logits ``[B, K]``.

    Sun et al., *Logit Standardization in Knowledge Distillation*, https://arxiv.org/abs/2403.01427.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def logit_pair(student: Tensor, teacher: Tensor, standardise: bool = False) -> tuple[Tensor, Tensor]:
    """Logits ``[B, K]`` of both networks in full precision, the teacher's without gradient, as z-scores if so asked."""
    pair = full_precision(student), frozen(teacher)
    return (standardised(pair[0]), standardised(pair[1])) if standardise else pair


def cross_entropy(log_p: Tensor, rows: Tensor, factor: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """``-factor/B Σ_b Σ_k rows_bk log p_bk``; a probability of 0 adds 0.

    Weights of single samples belong into the rows, which are constants: the gradient then is one product, without a
    pass per weight.

    Args:
        log_p: ``[B, K]``.
        rows: constant weights ``[B, K]``, changed in place by `counted`.
        factor: of the result.
        counted: weights of the samples ``[B]``; those that are 0, or False, add 0 but stay in B.

    Returns:
        A scalar.
    """
    return (_counted(rows, counted) * log_p).sum() * (-factor / len(rows))


def divergence(log_p: Tensor, log_q: Tensor, factor: float | Tensor = 1.0, counted: Tensor | None = None) -> Tensor:
    """``factor/B Σ_b KL(q_b ‖ p_b)`` from log-probabilities ``[B, K]``, q usually a constant; `counted` as above."""
    return (_counted(log_q.exp(), counted) * (log_q - log_p)).sum() * (factor / len(log_q))


def _counted(rows: Tensor, counted: Tensor | None) -> Tensor:
    if counted is None:
        return rows
    if counted.dtype != torch.bool:
        return rows * counted[:, None]
    # filling, not multiplying: a row that is not counted may hold what is not finite
    rows = rows.clone() if rows.requires_grad else rows  # its own backward pass needs it as it was
    return rows.masked_fill_(~counted[:, None], 0.0)


# A removed class: its exponential is exactly 0 and, unlike with -inf, so is 0 times its logarithm.
REMOVED = -1e30


def without(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits ``[B, K]`` in which softmax and log-sum-exp run over the classes other than the indices ``[B, J]``.

    This is exact where ``log(1 - p)`` would overflow because p rounds to 1.
    """
    return logits.scatter(1, classes, REMOVED)


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


def squared_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """``1/B Σ_b ‖s_b - t_b‖²`` in full precision for features ``[B, …]``; no gradient reaches the teacher's."""
    return F.mse_loss(full_precision(ours), frozen(theirs), reduction="sum") / len(ours)


def exact(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device, for sums and products that bfloat16 would spoil."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Unit(torch.autograd.Function):
    """``u = x / |x|`` along the last axis with its gradient ``(g - ⟨g, u⟩ u) / |x|``: half the passes of autograd's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True).clamp_(min=1e-12)
        vectors = tensor / lengths
        ctx.save_for_backward(vectors, lengths)
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        vectors, lengths = ctx.saved_tensors
        along = (grad * vectors).sum(-1, keepdim=True)
        return torch.addcmul(grad, vectors, along, value=-1).div_(lengths)


def unit(tensor: Tensor) -> Tensor:
    """Vectors along the last axis in full precision and of length 1 (0 where shorter than 1e-12)."""
    return _Unit.apply(full_precision(tensor))


class _GramDifference(torch.autograd.Function):
    """Mean of Δ² with Δ = TTᵀ - SSᵀ and its gradient -4 ΔS / count, so that no Gram matrix outlives the forward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        delta = torch.bmm(teacher, teacher.transpose(1, 2))  # [G, R, R]
        delta.baddbmm_(student, student.transpose(1, 2), alpha=-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.bmm(delta, student))
            ctx.factor = -4 / delta.numel()
        flat = delta.flatten()
        return flat.dot(flat) / len(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (ctx.factor * grad), None


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
