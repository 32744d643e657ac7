"""Contrastive representation distillation: an image's two embeddings must be told from those of other images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Samples, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.features import patch_role, pooled, width
from kd_hf.methods.losses import batch_mean, exact, full_precision, labelled, unit
from kd_hf.methods.ranks import gathered
from kd_hf.outputs import Outputs, Target

# of the published formula
EPSILON = 1e-7
# training images up to which negatives are drawn without replacement: the published scripts do on CIFAR's 50,000
_DISTINCT = 100_000
# similarities that exist at a time
_CHUNK = 2**26


class CRD(Method):
    """``student = 1/B Σ_b NCE(exp(v^s_b · M^t / τ) / Z^t)``, and ``teacher`` the same of v^t and M^s.

    v are linear embeddings of the features that the classifiers receive, of length 1; both layers learn, the teacher's
    too. The banks M ``[n, 128]`` hold an older embedding of every training image. With c_0 the image itself and c_1 …
    c_K of other classes, ``NCE(P) = -log(P_c0 / (P_c0 + m + ε)) - Σ_k log(m / (P_ck + m + ε))`` and m = K/n. Z are n
    times the mean of the first batch, and stay. After a batch its images' rows become ``normalise(μ M + (1 - μ) v)``.

    Banks and Z are part of the checkpoint and the same on all processes: every process writes what all of them saw.
    Negatives are drawn anew in every step, without replacement up to 100,000 training images. The scores of an image
    are a product with the whole bank, of which K + 1 are taken: the same numbers as those of K + 1 rows, for less.
    Images without a label add 0, and are nobody's negatives.
    """

    name = "crd"
    weight = 0.8
    paper = Reference(
        "Contrastive Representation Distillation",
        "https://arxiv.org/abs/1910.10699",
        "https://github.com/HobbitLong/RepDistiller",
    )
    kept_equal = ("memory_s", "memory_t", "z_s", "z_t", "order", "starts", "counts")

    class Config(MethodConfig):
        """Options of CRD."""

        dim: int = Field(128, gt=0)
        """Width of the embeddings and of the banks."""
        negatives: int = Field(16384, gt=0)
        """K: images of other classes that each image is told from."""
        temperature: float = Field(0.07, gt=0)
        """τ: divides the similarities."""
        momentum: float = Field(0.5, ge=0, lt=1)
        """μ: how much of its old row an image keeps."""
        positive: Literal["exact", "relax"] = "exact"
        """The positive: the image itself, or a random one of its class, which `relax` takes."""
        replacement: bool | None = None
        """Whether negatives are drawn with replacement; by default where there are too few or more than 100,000."""
        student_tap: str = "pre_logits"
        """The student's features; maps and tokens are averaged over positions."""
        teacher_tap: str = "pre_logits"
        """The teacher's features; maps and tokens are averaged over positions."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One feature of each network, index labels, and the number of every image."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        return Needs(
            student={patch_role("feature", cfg.student_tap, student): cfg.student_tap},
            teacher={patch_role("feature", cfg.teacher_tap, teacher): cfg.teacher_tap},
            labels="hard",
            samples=True,
            batch_coupled=True,
            gathered=True,
        )

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        ((self.role, ours),), ((self.role_t, theirs),) = student.taps.items(), teacher.taps.items()
        self.embed_s, self.embed_t = _Embedding(width(ours), cfg.dim), _Embedding(width(theirs), cfg.dim)
        # where nothing is trained (a plan) the images need not be known
        self.count = 0 if student.samples is None else len(student.samples)
        bound = 1 / math.sqrt(cfg.dim / 3)
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, (2 * torch.rand(self.count, cfg.dim) - 1) * bound)
        for name in ("z_s", "z_t"):
            self.register_buffer(name, torch.tensor(-1.0))  # below 0: not set yet
        order, starts, counts = _classes(student.samples, student.num_classes)
        for name, values in (("order", order), ("starts", starts), ("counts", counts)):
            self.register_buffer(name, torch.as_tensor(values, device=self.z_s.device), persistent=False)
        self.num_labelled, fewest = len(order), len(order) - int(counts.max(initial=0))
        few = fewest < cfg.negatives
        self.replacement = few or (self.count > _DISTINCT if cfg.replacement is None else cfg.replacement)

    memory_s: Tensor
    memory_t: Tensor
    z_s: Tensor
    z_t: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor

    def draw(self, draws: Draws) -> Mapping[str, Tensor]:
        """``negatives``: int64 ``[B, K]`` below 2⁴⁸ with replacement, else a rank in [0, 1) of each labelled image.

        With `positive: relax` also ``positive`` ``[B, 1]`` in [0, 1).
        """
        relaxed = {} if self.cfg.positive == "exact" else {"positive": draws.uniform("crd/positive", (1,))}
        if not self.replacement:
            return {"negatives": draws.uniform("crd/negatives", (self.num_labelled,)), **relaxed}
        # 24 bits are too few to reach every one of a million images equally often
        coarse, fine = (draws.uniform(f"crd/negatives/{part}", (self.cfg.negatives,)) for part in ("coarse", "fine"))
        return {"negatives": ((coarse * 2**24).long() << 24) + (fine * 2**24).long(), **relaxed}

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"student": scalar, "teacher": scalar}``.

        `draws` may hold ``contrast_index`` ``[B, K + 1]``, the rows of the bank themselves with the positive first.
        """
        assert teacher is not None
        if target.row is None:
            raise UserError("methods.crd keeps an embedding of every training image, and these images have no numbers")
        vectors = self.embed_s(pooled(self.role, student.taps[self.role]))
        reference = self.embed_t(pooled(self.role_t, teacher.taps[self.role_t].detach()))
        chosen = draws["contrast_index"] if "contrast_index" in draws else self._choose(target, draws)
        with torch.no_grad(), exact(vectors):
            banks = ((vectors, self.memory_t), (reference, self.memory_s))
            scores = [(similarities(rows, bank, chosen) / self.cfg.temperature).exp() for rows, bank in banks]
            # one message: the embeddings of all processes, and their means for Z
            means = torch.stack([score.mean() for score in scores]).expand(len(vectors), 2)
            everyone = gathered(torch.cat([vectors, reference, means], 1))
            z = [len(self.memory_s) * mean for mean in everyone[:, -2:].mean(0)]
            z = [torch.where(old < 0, new, old) for old, new in zip((self.z_s, self.z_t), z, strict=True)]
            pairs = zip(scores, z, banks, strict=True)
            terms = [self._contrast(score / factor, bank, chosen) for score, factor, (_, bank) in pairs]
            if self.training:
                self._remember(gathered(target.row), everyone[:, :-2].chunk(2, 1), z)
        losses = (_Known.apply(rows, *term) for rows, term in zip((vectors, reference), terms, strict=True))
        known = target.hard >= 0
        return {name: batch_mean(values, known) for name, values in zip(("student", "teacher"), losses, strict=True)}

    def cost(self) -> Cost:
        """Own parameters, the multiply–accumulates of embeddings and banks, and the bytes of both banks per image."""
        parameters, dim = super().cost().parameters, self.cfg.dim
        kernels = self.embed_s.linear.weight.numel() + self.embed_t.linear.weight.numel()
        return Cost(parameters=parameters, macs=kernels + 2 * self.count * dim, sample_bytes=2 * 4 * dim)

    def _choose(self, target: Target, draws: Mapping[str, Tensor]) -> Tensor:
        """The positive's row and those of the negatives, ``[B, K + 1]``."""
        assert target.row is not None
        label, _ = labelled(target.hard)
        start, count = self.starts[label][:, None], self.counts[label][:, None]
        if self.replacement:
            others = self.num_labelled - count
            place = draws["negatives"] % others
            place += count * (place >= start)  # step over the own class
        else:
            places = torch.arange(self.num_labelled, device=label.device)
            own = (places >= start) & (places < start + count)
            ranks = draws["negatives"].masked_fill(own, 2.0)
            place = ranks.topk(self.cfg.negatives, largest=False, sorted=False).indices
        positive = target.row[:, None]
        if self.cfg.positive == "relax":
            positive = self.order[(start + (draws["positive"] * count).long()).clamp(max=self.num_labelled - 1)]
        return torch.cat([positive, self.order[place]], 1)

    def _contrast(self, odds: Tensor, bank: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every image ``[B]`` and its gradient with respect to the embedding ``[B, D]``.

        Args:
            odds: P ``[B, K + 1]``.
            bank: ``[n, D]`` that P was read from.
            chosen: the rows that it was read at.
        """
        share = (chosen.shape[1] - 1) / len(bank)
        sums = odds + (share + EPSILON)
        # -log(m / (P + m + ε)) is near 0 for most, where a difference of logarithms would be rounding
        terms = ((odds + EPSILON) / share).log1p()
        terms[:, 0] = (sums[:, 0] / odds[:, 0]).log()
        slopes = odds / sums
        slopes[:, 0] -= 1
        return terms.sum(1), weighted_rows(slopes, bank, chosen) / self.cfg.temperature

    @torch.compiler.disable  # graphs of torch up to 2.11 lose one of two buffers that are set from parts of a tensor
    def _remember(self, rows: Tensor, vectors: tuple[Tensor, ...], z: list[Tensor]) -> None:
        """Move the rows of all images of the step, and set Z. Of an image that occurs twice the last one counts."""
        self.z_s.copy_(z[0])
        self.z_t.copy_(z[1])
        positions = torch.arange(len(rows), device=rows.device)
        last = positions.new_zeros(self.count).scatter_reduce_(0, rows, positions, "amax")[rows]
        momentum = self.cfg.momentum
        for bank, new in zip((self.memory_s, self.memory_t), vectors, strict=True):
            moved = unit(momentum * bank[rows] + (1 - momentum) * new[last])
            bank.index_copy_(0, rows, moved)


class _Embedding(nn.Module):
    """A Linear layer to vectors of length 1 in full precision: ``[B, C] → [B, D]``."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features."""
        return unit(full_precision(self.linear(features.to(self.linear.weight.dtype))))


class _Known(torch.autograd.Function):
    """Values ``[B]`` of rows ``[B, D]`` whose gradients ``[B, D]`` are known already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return grad[:, None] * gradients, None, None


def similarities(vectors: Tensor, bank: Tensor, chosen: Tensor) -> Tensor:
    """``v_b · M[c_bk]`` of vectors ``[B, D]``, a bank ``[n, D]`` and its rows ``[B, K]``: ``[B, K]``."""
    step = max(1, _CHUNK // max(1, len(bank)))
    parts = zip(vectors.split(step), chosen.split(step), strict=True)
    return torch.cat([(rows @ bank.T).gather(1, columns) for rows, columns in parts])


def weighted_rows(weights: Tensor, bank: Tensor, chosen: Tensor) -> Tensor:
    """``Σ_k w_bk M[c_bk]`` of weights ``[B, K]``, a bank ``[n, D]`` and its rows ``[B, K]``: ``[B, D]``."""
    step = max(1, _CHUNK // max(1, len(bank)))
    sums = []
    for values, columns in zip(weights.split(step), chosen.split(step), strict=True):
        spread = values.new_zeros(len(values), len(bank))
        sums.append(spread.scatter_add_(1, columns, values) @ bank)
    return torch.cat(sums)


def _classes(samples: Samples | None, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labelled images class after class, int64 ``[L]``; where each class begins there, and its size, ``[K]``.

    Raises:
        UserError: fewer than two classes, so that no image has a negative.
    """
    labels = np.empty(0, np.int64) if samples is None else np.asarray(samples.labels(), np.int64)
    rows = np.flatnonzero(labels >= 0)
    order = rows[np.argsort(labels[rows], kind="stable")]
    counts = np.bincount(labels[rows], minlength=num_classes)
    if samples is not None and (counts > 0).sum() < 2:
        raise UserError("methods.crd tells images of different classes apart, and the training images have one or none")
    return order, np.cumsum(counts) - counts, counts
