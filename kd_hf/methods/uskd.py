"""Universal self-knowledge distillation: customised soft labels without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, MethodConfig, Needs, Reference
from kd_hf.methods.losses import cross_entropy, full_precision, without
from kd_hf.outputs import Outputs, Target

# fixed in the published loss, whatever the task loss does
SMOOTHING = 0.1
RANK_EPSILON = 1e-6

# The role a tap is declared under says how it becomes a vector, which shapes alone cannot tell.
CLASS_TOKEN, POOLED, NORMED = "class_token", "pooled", "normed"


class USKD(Method):
    """Three parts from the student alone: its logits z, and a weak head ``w = W f + b`` on a middle feature f.

    The targets of a sample are its label (value v = 1), or the two largest entries of a mixed label row (v1 ≥ v2).

    - ``target = -α/B Σ_b Σ_j V_j log p_j`` with ``V_j = p_j² + v_j - mean_batch(p_j²)``, and 0 where v_j = 0;
    - ``nontarget = -β/B Σ_b Σ_k ζ_k log p̂_k`` over the classes that are no targets; ζ is Zipf's 1 / rank of
      ``σ(w)_k / (1 - Σ_j σ(w)_j) + g_k / (1 - Σ_j g_j)``, ranked over all classes, then normalised over the rest;
    - ``weak = -μ/B Σ_b Σ_k Y'_k log σ(w)_k`` with label smoothing 0.1; it trains W, b and, through f, the network.

    p = softmax(z), p̂ its normalisation without the targets, σ = softmax. ``rank: softmax`` takes g = p, which puts
    both summands on one scale and is the code of the published table; later revisions of that code take
    g = log p (``rank: log_softmax``), under which the weak head hardly matters. The mean over the batch couples its
    samples. Samples without a label add 0 and are not part of that mean.

    Defaults (α, β, μ) = (1, 0.1, 0.005) are those of ImageNet; CIFAR-100 uses (0.1, 0.1, 0.1).
    """

    name = "uskd"
    paper = Reference(
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels",
        "https://arxiv.org/abs/2303.13005",
        "https://github.com/yzd-v/cls_KD",
    )

    class Config(MethodConfig):
        """Options of USKD."""

        alpha: float = Field(1.0, ge=0)
        """Factor of the target part."""
        beta: float = Field(0.1, ge=0)
        """Factor of the non-target part."""
        mu: float = Field(0.005, ge=0)
        """Factor of the weak head's supervision."""
        rank: Literal["softmax", "log_softmax"] = "softmax"
        """What the student's logits enter the ranking as."""
        tap: str | None = None
        """The middle feature; by default the class token half-way up a ViT, else the last stage but one."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """One feature of the student, and labels."""
        tap = cfg.tap or _middle(student)
        return Needs(student={_role(tap, student): tap}, labels="soft", batch_coupled=True)

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        if student.num_classes < 3:
            raise UserError(f"methods.uskd ranks the classes beside two targets; {student.num_classes} are too few")
        (self.role, shape), *_ = student.taps.items()
        # maps are (C, H, W); token sequences (N, C); single tokens (C,)
        channels = shape[0] if len(shape) == 3 else shape[-1]
        self.norm = nn.LayerNorm(channels) if self.role == NORMED else nn.Identity()
        self.weak = nn.Linear(channels, student.num_classes)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"target": scalar, "nontarget": scalar, "weak": scalar}``, factors included.

        `draws` may hold ``label_top2`` ``[B, 2]``, the target classes under mixed labels, to fix the second one of
        rows with a single class; by default it is the first class of those with value 0.
        """
        logits = full_precision(student.logits)
        weak = full_precision(self.weak(self._vector(student.taps[self.role])))
        known = target.hard >= 0
        rows = target.rows(logits.shape[1], logits.dtype)
        classes = _targets(target, rows, draws)  # [B, J]
        values = rows.gather(1, classes)

        log_p, log_sigma = logits.log_softmax(1), weak.log_softmax(1)
        picked = log_p.gather(1, classes)
        weights = _target_weights(picked.detach(), values, known)
        zipf = self._zipf(log_sigma.detach(), log_p.detach(), classes)
        smoothed = (1 - SMOOTHING) * rows + SMOOTHING / logits.shape[1]
        return {
            "target": cross_entropy(picked, weights, self.cfg.alpha, known),
            "nontarget": cross_entropy(without(logits, classes).log_softmax(1), zipf, self.cfg.beta, known),
            "weak": cross_entropy(log_sigma, smoothed, self.cfg.mu, known),
        }

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the weak head."""
        return Cost(parameters=super().cost().parameters, macs=self.weak.weight.numel())

    def _vector(self, feature: Tensor) -> Tensor:
        """A map ``[B, C, H, W]``, token sequence ``[B, N, C]`` or token ``[B, C]`` as ``[B, C]``."""
        if feature.ndim == 4:
            feature = feature.flatten(2).transpose(1, 2)
        feature = self.norm(feature)
        if feature.ndim == 2:
            return feature
        return feature[:, 0] if self.role == CLASS_TOKEN else feature.mean(1)

    def _zipf(self, log_sigma: Tensor, log_p: Tensor, classes: Tensor) -> Tensor:
        """Soft labels ``[B, K]`` from the ranking: 1 / rank, 0 at the targets, rows that sum to 1."""
        strong = log_p.exp() if self.cfg.rank == "softmax" else log_p
        score = _share_of_rest(log_sigma.exp(), classes) + _share_of_rest(strong, classes)
        order = score.argsort(dim=1, descending=True, stable=True)
        inverse = 1 / torch.arange(1, score.shape[1] + 1, device=score.device, dtype=score.dtype)
        zipf = torch.empty_like(score).scatter_(1, order, inverse.expand_as(score)).scatter_(1, classes, 0.0)
        return zipf / zipf.sum(1, keepdim=True)


def _middle(student: ModelInfo) -> str:
    """Name the tap half-way up the network. Raises UserError when the network has neither stages nor blocks."""
    if student.blocks and (student.prefix or len(student.stages) < 2):
        return f"block:{max(0, student.depth // 2 - 1)}"
    if len(student.stages) >= 2:
        return "stage:-2"
    raise UserError(f"methods.uskd.tap: '{student.name}' has no stages or blocks to choose from; name a tap")


def _role(tap: str, student: ModelInfo) -> str:
    """How a tap becomes a vector: its class token, the mean over positions, or that after an own LayerNorm."""
    kind, _, index = tap.partition(":")
    if kind == "stage" and index.lstrip("-").isdigit():
        position = int(index) - 1 if int(index) > 0 else int(index)
        known = -len(student.stages) <= position < len(student.stages)
        return NORMED if known and student.stages[position].layout != "NCHW" else POOLED
    first_is_class = student.prefix[:1] == ("cls",) and tap != "tokens:patch"
    return CLASS_TOKEN if first_is_class else POOLED


def _targets(target: Target, rows: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Class indices: ``[B, 1]`` for index labels, ``[B, 2]`` for the two largest entries of label rows."""
    if target.soft is None:
        return target.hard.clamp(min=0)[:, None]
    if "label_top2" in draws:
        return draws["label_top2"]
    # argmax takes the first of equal entries on every device; topk does not promise which
    first = rows.argmax(1, keepdim=True)
    second = rows.scatter(1, first, -1.0).argmax(1, keepdim=True)
    return torch.cat([first, second], dim=1)


def _target_weights(log_p: Tensor, values: Tensor, known: Tensor) -> Tensor:
    """V ``[B, J]`` from log-probabilities and label values ``[B, J]`` of the targets."""
    squares = log_p.exp().square()
    mean = (squares * known[:, None]).sum(0) / known.sum().clamp(min=1)
    return (squares + values - mean).masked_fill(values == 0, 0.0)


def _share_of_rest(scores: Tensor, classes: Tensor) -> Tensor:
    """``g_k / (1 - Σ_j g_j)`` with j the target classes: ``[B, K]``."""
    return scores / (1 - scores.gather(1, classes).sum(1, keepdim=True) + RANK_EPSILON)
