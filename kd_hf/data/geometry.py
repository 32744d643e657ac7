"""Where a training image is cropped, moved and flipped: drawn for one sample or for many, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from kd_hf.data.pixels import CropBox
from kd_hf.draws import first_bits, generator
from kd_hf.recipe.config import AugmentConfig, CropConfig

ENHANCERS: Mapping[str, Callable[[Image.Image], Any]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
CROP_ATTEMPTS = 10


# --- one sample ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """One sample's draws, the same for all its views."""

    box: CropBox | None = None
    """On the decoded image; None is the whole of it."""
    shift: tuple[float, float] = (0.0, 0.0)
    """(x, y) by which the resized image is moved, as fractions of the view's side."""
    flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    """Enhancers and their factors, in the order of application."""


def draw_geometry(augment: AugmentConfig, size: tuple[int, int], reference: int, key: int) -> Geometry:
    """Draw crop, flip and colour jitter.

    Args:
        augment: the recipe's block.
        size: (width, height) of the decoded image.
        reference: side of the reference view in pixels.
        key: of the sample.
    """
    draws = generator(key, "geometry")
    crop = augment.crop
    box = random_resized_box(crop, size, draws) if crop.kind == "random_resized" else None
    shift = (0.0, 0.0)
    if crop.kind == "pad":
        dx, dy = draws.integers(-crop.padding, crop.padding + 1, size=2)
        shift = (float(dx) / reference, float(dy) / reference)
    flip = bool(draws.random() < augment.hflip)
    jitter: tuple[tuple[str, float], ...] = ()
    if augment.color_jitter and takes_jitter(augment.auto_augment):
        names = [list(ENHANCERS)[i] for i in draws.permutation(len(ENHANCERS))]
        low, high = max(0.0, 1.0 - augment.color_jitter), 1.0 + augment.color_jitter
        jitter = tuple((name, float(draws.uniform(low, high))) for name in names)
    return Geometry(box, shift, flip, jitter)


def takes_jitter(policy: str | None) -> bool:
    """Whether colour jitter is used beside a policy: with 3-Augment only, as in timm."""
    return not policy or policy.startswith("3a")


def random_resized_box(crop: CropConfig, size: tuple[int, int], draws: np.random.Generator) -> CropBox:
    """The box of torchvision's RandomResizedCrop for an image of (width, height)."""
    width, height = size
    for _ in range(CROP_ATTEMPTS):
        area = draws.uniform(*crop.scale) * width * height
        aspect = float(np.exp(draws.uniform(np.log(crop.ratio[0]), np.log(crop.ratio[1]))))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws.integers(0, width - w + 1)), int(draws.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height  # no box of this area and aspect fits: the largest central one of an allowed aspect
    if width / height < crop.ratio[0]:
        h = min(height, round(w / crop.ratio[0]))
    elif width / height > crop.ratio[1]:
        w = min(width, round(h * crop.ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# --- many samples, on the device ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placing:
    """How the images of a view are still to be moved and flipped."""

    moves: Tensor
    """int64 ``[B, 3]``: pixels to the right, pixels down, and 1 where the image is flipped after that."""
    padding: int
    """No image is moved further than this in either direction."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Placing:
        """The same with the function's result in the place of the tensor."""
        return replace(self, moves=function(self.moves))


def draw_moves(augment: AugmentConfig, keys: np.ndarray) -> np.ndarray:
    """What :func:`draw_geometry` draws where nothing is cropped before resizing and nothing is jittered.

    Args:
        augment: the recipe's block; its crop is `pad` or `resize`.
        keys: int64 ``[B]``, of the samples.

    Returns:
        int64 ``[B, 3]``: pixels of the reference view to the right and down, and 1 where the image is flipped.
    """
    padding = augment.crop.padding if augment.crop.kind == "pad" else 0
    bits = first_bits(keys, "geometry")
    shift = np.zeros((len(keys), 2), np.int64)
    again = np.zeros(0, np.int64)
    if padding:  # numpy's bounded integers: both halves of the first word, scaled, and drawn anew in the rarest cases
        span = np.uint64(2 * padding + 1)
        halves = np.stack([bits[:, 0] & np.uint64(0xFFFFFFFF), bits[:, 0] >> np.uint64(32)], 1)
        scaled = halves * span
        shift = (scaled >> np.uint64(32)).astype(np.int64) - padding
        again = np.flatnonzero(((scaled & np.uint64(0xFFFFFFFF)) < (2**32 - span) % span).any(1))
    unit = (bits[:, 1 if padding else 0] >> np.uint64(11)) * 2.0**-53
    moves = np.concatenate([shift, (unit < augment.hflip)[:, None]], 1)
    for place in again.tolist():
        one = draw_geometry(augment, (1, 1), 1, int(keys[place]))
        moves[place] = (*one.shift, one.flip)
    return moves


def scaled_moves(moves: np.ndarray, padding: int, reference: int, side: int) -> Placing:
    """The placing of a view of `side` pixels for moves in pixels of the reference view, as for a single sample."""
    scaled = moves.copy()
    scaled[:, :2] = np.rint(moves[:, :2] / reference * side)
    return Placing(torch.from_numpy(scaled), round(padding / reference * side))


def placed(images: Tensor, placing: Placing) -> Tensor:
    """Move and flip uint8 ``[B, C, S, S]``, with zeros where nothing is left; no sync with the host."""
    side, padding = images.shape[-1], placing.padding
    right, down, flip = placing.moves.unbind(1)
    places = torch.arange(side, device=images.device)
    rows = places - down[:, None] + padding  # [B, S], of the padded image
    columns = torch.where(flip[:, None] > 0, places.flip(0), places) - right[:, None] + padding
    wide = torch.nn.functional.pad(images, (padding,) * 4)
    index = (rows[:, :, None] * wide.shape[-1] + columns[:, None, :]).flatten(1)  # [B, S·S]
    found = wide.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1))
    return found.unflatten(2, (side, side))
