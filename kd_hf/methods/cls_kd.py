"""[CLS]-KD: distil class tokens, and how similar patches are to them, with weights that adapt over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Cost, Method, Needs, Reference, require_teacher
from kd_hf.methods.losses import exact, frozen, full_precision, gram_difference, unit
from kd_hf.methods.manifold import ManifoldTerms, draw_tokens, paired, paired_taps, relations, weighted
from kd_hf.methods.projectors import TokenProjector, kernel_macs
from kd_hf.outputs import Outputs, Target


class ClsKD(Method):
    """``cls = w_cls C(L^cls)`` and ``atn = w_atn C(L^atn)`` over pairs i of block outputs with unit tokens ŝ, t̂.

    - ``L^cls_i = mean (t̂_0 - g(ŝ_0))²`` with g one projector for all pairs (Linear, GELU, Linear), or
      ``mean (T̂ T̂ᵀ - Ŝ Ŝᵀ)²`` over the class tokens of the batch (``dim_match: relation``, without projector);
    - ``L^atn_i = mean_p (⟨t̂_0, t̂_p⟩ - ⟨ŝ_0, ŝ_p⟩)²`` over the patches p.

    ``C(L) = 1/n Σ_i c_i w_i L_i`` with ``w_i = n L_i / Σ_j L_j``; c is `last_w` for the last pair listed and 1 for
    the others. With `manifold` the terms ``sample``, ``patch`` and ``rand`` of the method `manifold` are added times
    β, the class token included; without it `norm_distill` may add ``norm``, which compares the lengths of the tokens.

    The published code lets gradient flow through w, so that a pair whose share of ΣL is small is pushed to a larger
    loss; ``detach_weights: true`` takes w as constants. The published number uses the default.

    The paper's loss adds ``deit_soft`` with weight 1 and gives `task` weight 0: labels have no influence then.
    """

    name = "cls_kd"
    paper = Reference(
        "Adaptive class token knowledge distillation for efficient vision transformer",
        "https://doi.org/10.1016/j.knosys.2024.112531",
        "https://github.com/kmc3661/cls-kd",
    )

    class Config(ManifoldTerms):
        """Options of [CLS]-KD."""

        dim_match: Literal["projector", "relation"] = "projector"
        """How class tokens of different widths are compared."""
        use_projector: bool | None = None
        """Whether `dim_match: projector` has one; by default where the widths differ."""
        w_cls: float = Field(1.0, ge=0)
        """Factor of the class tokens."""
        w_atn: float = Field(2.0, ge=0)
        """Factor of the similarities between class token and patches."""
        last_w: float = Field(4.0, ge=0)
        """Factor of the last pair, beside the adaptive weights."""
        detach_weights: bool = False
        """Whether the adaptive weights are constants for the gradient."""
        manifold: bool = True
        """Whether the manifold terms are part of the loss."""
        beta: float = Field(1.0, ge=0)
        """Factor of the manifold terms."""
        norm_distill: bool = False
        """Whether the lengths of the tokens are compared; only without `manifold`."""
        w_norm: float = Field(1.0, ge=0)
        """Factor of that comparison."""

        @model_validator(mode="after")
        def _one_of_two(self) -> ClsKD.Config:
            if self.norm_distill and self.manifold:
                raise ValueError("norm_distill is an alternative to the manifold terms; set manifold: false with it")
            return self

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Block outputs of two plain transformers with a class token and no other prefix token."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        ours, theirs = paired_taps(cls.name, cfg, student, teacher)
        for side, info in (("student", student), ("teacher", teacher)):
            if info.block_prefix != ("cls",):
                raise UserError(
                    f"methods.cls_kd takes the first token for the class and the others for patches; the blocks of the "
                    f"{side} '{info.name}' have the prefix tokens: {', '.join(info.block_prefix) or 'none'}. Choose a "
                    "ViT or DeiT with a class token alone, or method manifold"
                )
        return Needs(student=ours, teacher=theirs, batch_coupled=True)

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        (self.tokens, width), (theirs, channels) = (next(iter(s.taps.values())) for s in (student, teacher))
        if self.tokens != theirs:
            raise UserError(
                f"methods.cls_kd compares token by token; the student's blocks have {self.tokens} and the teacher's "
                f"{theirs} (choose image sizes or networks with equal grids)"
            )
        self.widths = width + channels
        projects = (width != channels) if cfg.use_projector is None else cfg.use_projector
        if cfg.dim_match == "projector" and width != channels and not projects:
            raise UserError(
                f"methods.cls_kd.use_projector: class tokens of width {width} and {channels} cannot be compared "
                "without a projector; set it to true or use dim_match: relation"
            )
        # one that ran without a gradient would stop distributed training at the second step
        self.projector = TokenProjector(width, channels) if projects and cfg.dim_match == "projector" else nn.Identity()

    def draw(self, draws: Draws) -> Mapping[str, Tensor]:
        """``perm.<k>`` as in the method `manifold`; nothing without its terms."""
        return draw_tokens(self.cfg, draws, self.tokens) if self.cfg.manifold else {}

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"cls": scalar, "atn": scalar}`` and those of the manifold or norm terms, factors included."""
        assert teacher is not None
        cfg = self.cfg
        classes, similarities, terms, norms = [], [], [], []
        for k, (ours, theirs) in enumerate(paired(cfg, student, teacher)):
            s, t = unit(ours), unit(frozen(theirs))  # [B, N, D]
            (token, near), (token_t, near_t) = _from_class(s), _from_class(t)
            classes.append(self._class_token(token, token_t))
            similarities.append((near_t - near).square().mean())
            if cfg.manifold:
                terms.append(relations(s, t, draws[f"perm.{k}"][: cfg.K]))
            elif cfg.norm_distill:
                norms.append((_lengths(frozen(theirs)) - _lengths(ours)).square().mean())
        losses = {"cls": cfg.w_cls * self._combined(classes), "atn": cfg.w_atn * self._combined(similarities)}
        if cfg.manifold:
            losses |= {name: cfg.beta * term for name, term in weighted(cfg, terms).items()}
        elif cfg.norm_distill:
            values = torch.stack(norms)
            losses["norm"] = cfg.w_norm * (self._factors(values) * values).mean()
        return losses

    def cost(self) -> Cost:
        """Own parameters, and the multiply–accumulates of the projector and of ⟨·_0, ·_p⟩, for each pair."""
        macs = kernel_macs(self.projector.modules()) + (self.tokens - 1) * self.widths
        return Cost(parameters=super().cost().parameters, macs=macs * len(self.cfg.student_blocks))

    def _class_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L^cls of unit class tokens ``[B, D_s], [B, D_t]``."""
        if self.cfg.dim_match == "relation":
            return gram_difference(student[None], teacher[None])
        with exact(student):
            return (teacher - self.projector(student)).square().mean()

    def _factors(self, values: Tensor) -> Tensor:
        """c ``[n]``: 1, and `last_w` for the last pair."""
        factors = torch.ones_like(values)
        factors[-1].fill_(self.cfg.last_w)  # assigning a number would wait for the GPU
        return factors

    def _combined(self, losses: Sequence[Tensor]) -> Tensor:
        values = torch.stack(list(losses))
        return adaptive_mean(values, self._factors(values), self.cfg.detach_weights)


def adaptive_mean(losses: Tensor, factors: Tensor, detach: bool = False) -> Tensor:
    """``1/n Σ c_i w_i L_i`` with ``w_i = n L_i / Σ_j L_j``, and 0 where all losses are 0.

    Args:
        losses: L ``[n]``, not negative.
        factors: c ``[n]``.
        detach: whether w is constant for the gradient.
    """
    weights = losses.detach() if detach else losses
    shares = weights / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)
    return (factors * shares * losses).sum()


def _from_class(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit tokens ``[B, N, D]`` the class token ``[B, D]`` and its cosine with each patch ``[B, N-1]``."""
    # one split has one gradient; three slices would each fill a copy of the tokens with zeros
    token, patches = tokens.split((1, tokens.shape[1] - 1), dim=1)
    with exact(tokens):
        return token[:, 0], torch.bmm(patches, token.transpose(1, 2)).squeeze(2)


def _lengths(tokens: Tensor) -> Tensor:
    """Lengths of the tokens of an image, as a vector of length 1: ``[B, N]``."""
    return unit(full_precision(tokens).norm(dim=2))
