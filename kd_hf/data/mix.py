"""Mixup, CutMix and random erasing with explicit draws: a global batch is mixed alike on any number of ranks.

Mixup: Zhang et al. 2018, https://arxiv.org/abs/1710.09412; CutMix: Yun et al. 2019,
https://arxiv.org/abs/1905.04899. The partner of batch position p is p xor 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_hf.draws import generator
from kd_hf.errors import UserError
from kd_hf.outputs import Target
from kd_hf.recipe.config import AugmentConfig


@dataclass(frozen=True)
class Box:
    """A rectangle as fractions of the image's sides, so that it means the same in every view."""

    top: float
    left: float
    bottom: float
    right: float

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) in pixels of an image of that size."""
        return (
            round(self.top * height),
            round(self.left * width),
            round(self.bottom * height),
            round(self.right * width),
        )


@dataclass(frozen=True)
class Mixing:
    """Batch positions ``start … stop - 1`` share one coefficient: λ of an image's own label, and CutMix's box."""

    start: int
    stop: int
    lam: float
    box: Box | None = None

    def shifted(self, by: int) -> Mixing:
        """The same `by` positions later."""
        return replace(self, start=self.start + by, stop=self.stop + by)


def is_mixing(augment: AugmentConfig) -> bool:
    """Whether the recipe mixes images at all."""
    return (augment.mixup > 0 or augment.cutmix > 0) and augment.mix_prob > 0


def check_mixing(augment: AugmentConfig, per_device: int) -> None:
    """Raise :class:`UserError` when images could not be paired within a rank's batch."""
    if is_mixing(augment) and per_device % 2:
        raise UserError(
            f"train.per_device_train_batch_size: {per_device} is odd, but data.augment.mixup and cutmix mix pairs of"
            " images; give an even number"
        )


def draw_mixing(augment: AugmentConfig, size: int, *key: int | str) -> tuple[float, Box | None]:
    """Draw (λ, CutMix box or None) named by `key`; `size` is the reference view's side in pixels.

    λ ~ Beta(α, α). The CutMix box has the area 1 − λ before it is clipped at the image's borders; λ is then
    corrected to the area that is really left.
    """
    draws = generator("mix", *key)
    mix, switch, cy, cx = (float(u) for u in draws.random(4))
    use_cutmix = augment.cutmix > 0 and (augment.mixup == 0 or switch < augment.switch_prob)
    alpha = augment.cutmix if use_cutmix else augment.mixup
    if mix >= augment.mix_prob:
        return 1.0, None
    lam = float(draws.beta(alpha, alpha))
    return _cut(lam, size, cy, cx) if use_cutmix else (lam, None)


def _cut(lam: float, size: int, cy: float, cx: float) -> tuple[float, Box | None]:
    # as in the authors' code of CutMix, whose boxes have even sides; timm's have odd ones too from 1.0.29 on
    half = int(size * math.sqrt(1.0 - lam)) // 2
    centre_y, centre_x = int(cy * size), int(cx * size)
    top, left = max(0, centre_y - half), max(0, centre_x - half)
    bottom, right = min(size, centre_y + half), min(size, centre_x + half)
    area = (bottom - top) * (right - left)
    if area == 0:
        return 1.0, None
    return 1.0 - area / size**2, Box(top / size, left / size, bottom / size, right / size)


def batch_mixing(
    augment: AugmentConfig, seed: int, epoch: int, start: int, count: int, global_batch: int, size: int
) -> tuple[Mixing, ...]:
    """Coefficients for epoch positions ``start … start + count - 1``, one entry per mixing group they touch.

    A group is `augment.mix_group` consecutive positions (by default a global batch) and has its draws from
    (seed, epoch, group), whichever rank holds which part of it.
    """
    group_size = augment.mix_group or global_batch
    found = []
    position = start
    while position < start + count:
        group = position // group_size
        stop = min(start + count, (group + 1) * group_size)
        lam, box = draw_mixing(augment, size, seed, epoch, group)
        found.append(Mixing(position - start, stop - start, lam, box))
        position = stop
    return tuple(found)


def join_mixing(parts: Sequence[Mixing]) -> tuple[Mixing, ...]:
    """The same coefficients with neighbours that agree as one entry."""
    joined: list[Mixing] = []
    for part in parts:
        if joined and joined[-1].stop == part.start and (joined[-1].lam, joined[-1].box) == (part.lam, part.box):
            joined[-1] = replace(joined[-1], stop=part.stop)
        else:
            joined.append(part)
    return tuple(joined)


def mix_images_(images: Tensor, mixing: Sequence[Mixing]) -> Tensor:
    """Mix float images ``[B, 3, H, W]`` in place with their partners and return them."""
    height, width = images.shape[-2:]
    for part in mixing:
        if part.lam == 1.0:
            continue
        pairs = images[part.start : part.stop].unflatten(0, (-1, 2))
        if part.box is None:
            pairs.copy_(part.lam * pairs + (1.0 - part.lam) * pairs.flip(1))
        else:
            top, left, bottom, right = part.box.pixels(height, width)
            inside = pairs[..., top:bottom, left:right]
            inside.copy_(inside.flip(1))
    return images


def mix_target(label: Tensor, mixing: Sequence[Mixing] | None, num_classes: int) -> Target:
    """Target of labels int64 ``[B]`` (-1: none): row = λ · onehot + (1 − λ) · onehot(partner), without smoothing.

    An unlabelled image contributes nothing to a row. `soft` is None when `mixing` is None.
    """
    if mixing is None:
        return Target(label)
    own = Target(label).rows(num_classes, torch.float32)
    rows = own.clone()
    for part in mixing:
        if part.lam == 1.0:
            continue
        pairs = own[part.start : part.stop].unflatten(0, (-1, 2))
        rows[part.start : part.stop] = (part.lam * pairs + (1.0 - part.lam) * pairs.flip(1)).flatten(0, 1)
    hard = torch.where(rows.sum(1) > 0, rows.argmax(1), -1)
    return Target(hard, rows)


@dataclass(frozen=True)
class Erasing:
    """A rectangle of one batch position that is replaced by noise."""

    position: int
    box: Box

    def shifted(self, by: int) -> Erasing:
        """The same `by` positions later."""
        return replace(self, position=self.position + by)


ERASE_AREA = (0.02, 1 / 3)  # timm's defaults, used by DeiT and its successors
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
ERASE_ATTEMPTS = 10


def draw_erasing(probability: float, size: int, key: int) -> Box | None:
    """Random erasing (Zhong et al. 2020, https://arxiv.org/abs/1708.04896): a sample's box, or None.

    Args:
        probability: that a sample is erased at all.
        size: side of the reference view in pixels.
        key: of the sample.
    """
    if probability == 0:
        return None
    draws = generator(key, "erase")
    if draws.random() >= probability:
        return None
    for _ in range(ERASE_ATTEMPTS):
        area = draws.uniform(*ERASE_AREA) * size * size
        aspect = math.exp(draws.uniform(*ERASE_LOG_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            top, left = int(draws.integers(0, size - height + 1)), int(draws.integers(0, size - width + 1))
            return Box(top / size, left / size, (top + height) / size, (left + width) / size)
    return None
