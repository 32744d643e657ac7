"""Fine-grained manifold distillation: the student's tokens must relate to each other as the teacher's do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference, require_teacher
from kd_hf.methods.losses import frozen, gram_difference, unit
from kd_hf.outputs import Outputs, Target


class BlockPairs(MethodConfig):
    """Which blocks are compared, for methods that pair blocks of two plain transformers."""

    student_blocks: tuple[int, ...] = Field((0, 1, 2, 3, -4, -3, -2, -1), min_length=1)
    """The student's blocks, counted from 0 or, when negative, from the end. Their order is that of the pairs."""
    teacher_blocks: tuple[int, ...] = Field((0, 1, 2, 3, -4, -3, -2, -1), min_length=1)
    """The teacher's block for each of them."""

    @model_validator(mode="after")
    def _one_for_one(self) -> BlockPairs:
        ours, theirs = len(self.student_blocks), len(self.teacher_blocks)
        if ours != theirs:
            raise ValueError(
                f"student_blocks names {ours} blocks and teacher_blocks {theirs}; they are paired in order"
            )
        return self


class ManifoldTerms(BlockPairs):
    """Options of the three manifold terms."""

    K: int = Field(192, gt=0)
    """How many tokens of a batch the `rand` term relates to each other."""
    w_sample: float = Field(0.1, ge=0)
    """Factor of the relations between images."""
    w_patch: float = Field(4.0, ge=0)
    """Factor of the relations within an image."""
    w_rand: float = Field(0.2, ge=0)
    """Factor of the relations between random tokens of the batch."""


class Manifold(Method):
    """``w R(F) = w mean_pairs mean (F̂_t F̂_tᵀ - F̂_s F̂_sᵀ)²`` for three choices of the rows F of block outputs.

    - ``patch``: the tokens of an image, for every image;
    - ``sample``: the images, for every token position;
    - ``rand``: K random tokens of the batch, the same in both networks, drawn anew for every pair.

    F̂ has rows of length 1, so widths may differ. Block outputs are taken after the second residual addition,
    before the final norm. A student with more tokens than the teacher loses its first ones: its class token when
    the teacher's blocks have none (CaiT). With equal counts class tokens take part; a distilled student against a
    teacher with a class token alone lines its distillation token up with that. This is the published behaviour.

    The paper's loss adds ``deit_soft`` with weight 1 to it and gives `task` weight 0; β is the recipe's weight. The
    default blocks are the first and the last four, the paper's for 12 and 24 blocks. Relations cover the images of
    one process.
    """

    name = "manifold"
    paper = Reference(
        "Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation",
        "https://arxiv.org/abs/2107.01378",
        "https://github.com/Hao840/manifold-distillation",
    )

    class Config(ManifoldTerms):
        """Options of manifold distillation."""

        max_patch_num: int = Field(0, ge=0)
        """Where there are more patches than this, merge squares of patches by joining their channels; 0 never does."""

    cfg: Config

    @classmethod
    def needs(cls, cfg: Config, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Block outputs of two plain transformers."""
        teacher = require_teacher(cls.name, teacher, student, same_classes=False)
        ours, theirs = paired_taps(cls.name, cfg, student, teacher)
        return Needs(student=ours, teacher=theirs, batch_coupled=True)

    def __init__(self, cfg: Config, student: Shapes, teacher: Shapes | None, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(cfg, student, teacher, parts)
        assert teacher is not None
        ours, self.tokens = (next(iter(shapes.taps.values()))[0] for shapes in (student, teacher))
        if not _equal_grids(ours, self.tokens, student.prefix, teacher.prefix):
            raise UserError(
                f"methods.manifold compares token by token; the student's blocks have {ours} and the teacher's "
                f"{self.tokens}. The student may have more prefix tokens, but the grids of patches must be equal "
                "(choose image sizes or networks for that)"
            )
        self.merged = _merged_side(self.tokens, cfg.max_patch_num)

    def draw(self, draws: Draws) -> Mapping[str, Tensor]:
        """``perm.<k>``: K distinct indices into the tokens of the batch for pair k, image by image."""
        return draw_tokens(self.cfg, draws, self.merged**2 if self.merged else self.tokens)

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"sample": scalar, "patch": scalar, "rand": scalar}``, factors included."""
        assert teacher is not None
        terms = [
            relations(self._rows(ours), self._rows(frozen(theirs)), draws[f"perm.{k}"][: self.cfg.K])
            for k, (ours, theirs) in enumerate(paired(self.cfg, student, teacher))
        ]
        return weighted(self.cfg, terms)

    def _rows(self, feature: Tensor) -> Tensor:
        """A block's output ``[B, N, D]`` as unit tokens, aligned and merged."""
        # a slice of everything would still be copied by the backward pass
        tokens = feature if feature.shape[1] == self.tokens else feature[:, -self.tokens :]
        return unit(merge_patches(tokens, self.merged) if self.merged else tokens)


def _equal_grids(ours: int, theirs: int, prefix: int | None, prefix_t: int | None) -> bool:
    """Whether sequences of tokens differ by the student's larger number of prefix tokens alone."""
    if prefix is not None and prefix_t is not None:
        return ours >= theirs and ours - prefix == theirs - prefix_t
    # of squares the next larger one has 2 √N + 1 more: such a surplus is no prefix
    return 0 <= ours - theirs <= 2 * math.isqrt(theirs)


def block_taps(key: str, side: str, blocks: Sequence[int], info: ModelInfo) -> dict[str, str]:
    """Taps of transformer blocks, under their own names as roles.

    Args:
        key: the recipe's key below ``methods``, for messages.
        side: "student" or "teacher", for messages.
        blocks: indices, negative from the end.
        info: the network.

    Raises:
        UserError: when the network is no plain transformer, or has no such block.
    """
    if not info.depth:
        raise UserError(
            f"methods.{key}: the {side} '{info.name}' has no transformer blocks over one sequence of tokens; choose "
            "a plain transformer (ViT, DeiT, CaiT), or a method for maps such as mgd or srrl"
        )
    for index in blocks:
        if not -info.depth <= index < info.depth:
            raise UserError(
                f"methods.{key}: the {side} '{info.name}' has {info.depth} blocks, 0 to {info.depth - 1}; "
                f"there is no block {index}"
            )
    return {f"block:{index}": f"block:{index}" for index in blocks}


def paired_taps(
    method: str, cfg: BlockPairs, student: ModelInfo, teacher: ModelInfo
) -> tuple[dict[str, str], dict[str, str]]:
    """Taps of the paired blocks of both networks, by role. Raises UserError as :func:`block_taps`."""
    return (
        block_taps(f"{method}.student_blocks", "student", cfg.student_blocks, student),
        block_taps(f"{method}.teacher_blocks", "teacher", cfg.teacher_blocks, teacher),
    )


def paired(cfg: BlockPairs, student: Outputs, teacher: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
    """The paired block outputs ``[B, N_s, D_s], [B, N_t, D_t]``, one pair after the other."""
    for ours, theirs in zip(cfg.student_blocks, cfg.teacher_blocks, strict=True):
        yield student.taps[f"block:{ours}"], teacher.taps[f"block:{theirs}"]


def draw_tokens(cfg: ManifoldTerms, draws: Draws, tokens: int) -> dict[str, Tensor]:
    """``perm.<k>``: for each pair, K distinct indices into the ``B · tokens`` tokens of a batch (all, if fewer)."""
    return {
        f"perm.{k}": draws.uniform(f"manifold/perm.{k}", (tokens,)).flatten().argsort(stable=True)[: cfg.K]
        for k in range(len(cfg.student_blocks))
    }


def relations(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """The three unweighted terms of a pair, as sample, patch, rand.

    Args:
        student: unit tokens ``[B, N, D_s]``.
        teacher: unit tokens ``[B, N, D_t]``.
        chosen: indices ``[K]`` into the B·N tokens, image by image.

    Returns:
        ``[3]``.
    """
    return torch.stack(
        [
            gram_difference(student.transpose(0, 1), teacher.transpose(0, 1)),
            gram_difference(student, teacher),
            gram_difference(*(side.flatten(0, 1).index_select(0, chosen)[None] for side in (student, teacher))),
        ]
    )


def weighted(cfg: ManifoldTerms, terms: Sequence[Tensor]) -> dict[str, Tensor]:
    """The named terms: the mean over pairs of what :func:`relations` gave, times the factors."""
    sample, patch, rand = torch.stack(list(terms)).mean(0)
    return {"sample": cfg.w_sample * sample, "patch": cfg.w_patch * patch, "rand": cfg.w_rand * rand}


def merge_patches(tokens: Tensor, side: int) -> Tensor:
    """Join k×k squares of a grid of patches, channels in row-major order: ``[B, (side·k)², D] → [B, side², k²·D]``."""
    k = math.isqrt(tokens.shape[1]) // side
    squares = tokens.unflatten(1, (side, k, side, k)).transpose(2, 3)  # [B, side, side, k, k, D]
    return squares.flatten(3).flatten(1, 2)


def _merged_side(tokens: int, limit: int) -> int:
    """Side of the grid that patches are merged to, 0 for none. Raises UserError where squares do not fill it."""
    if not limit or tokens <= limit:
        return 0
    side = math.isqrt(limit)
    if (math.isqrt(tokens) // side * side) ** 2 != tokens:
        raise UserError(
            f"methods.manifold.max_patch_num: {tokens} tokens of the teacher are no grid that squares merge to "
            f"{side}×{side}; choose the square of a divisor of its side, and a teacher without prefix tokens"
        )
    return side
