"""From encoded bytes and boxes to what a detector is shown: flips, crops and sizes that move both alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_hf.data.pixels import CropBox, UnreadableImage, as_tensor, decode
from kd_hf.detection.data.objects import Objects, Size, clipped, trainable, visible
from kd_hf.draws import generator
from kd_hf.recipe.config import BoxAugment


class Step(Protocol):
    """One change to an image and the boxes in it."""

    def image(self, image: Image.Image) -> Image.Image:
        """The changed image."""

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """The changed boxes, float64 ``[n, 4]``: left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged, in an image of `width` pixels."""

    width: int

    def image(self, image: Image.Image) -> Image.Image:
        """See :class:`Step`."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """See :class:`Step`."""
        left, top, right, bottom = boxes.T
        return np.stack([self.width - right, top, self.width - left, bottom], 1)


@dataclass(frozen=True)
class Resize:
    """Another size, bilinear; the sides need not keep their proportion."""

    old: Size
    new: Size

    def image(self, image: Image.Image) -> Image.Image:
        """See :class:`Step`."""
        return image if self.old == self.new else image.resize(self.new, Image.Resampling.BILINEAR)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """See :class:`Step`."""
        ratios = np.asarray(self.new, np.float64) / np.asarray(self.old, np.float64)
        return boxes * np.tile(ratios, 2)


@dataclass(frozen=True)
class Crop:
    """A part of the image; boxes are cut off at its borders, and may be left without an area."""

    box: CropBox

    def image(self, image: Image.Image) -> Image.Image:
        """See :class:`Step`."""
        return image.crop(self.box)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """See :class:`Step`."""
        left, top, right, bottom = self.box
        return clipped(boxes - np.array([left, top, left, top], np.float64), (right - left, bottom - top))


def fitted(size: Size, shortest: int, longest: int | None, multiple: int = 1) -> Size:
    """The size of an image whose shortest side becomes `shortest`, or less where its longest would exceed `longest`.

    As in DETR; ViDT then rounds both sides down to multiples of 16.
    """
    low, high = min(size), max(size)
    if longest is not None and high / low * shortest > longest:
        shortest = round(longest * low / high)
    far = int(shortest * high / low)
    near, far = (max(multiple, side - side % multiple) for side in (shortest, min(far, longest or far)))
    return (near, far) if size[0] < size[1] else (far, near)


def draw_steps(augment: BoxAugment, size: Size, key: int) -> tuple[Step, ...]:
    """Draw what is done to a training image of (width, height), named by the sample's `key`."""
    draws = generator(key, "boxes")
    flip, crop = draws.random() < augment.hflip, draws.random() < augment.crop
    steps: list[Step] = [Flip(size[0])] if flip else []
    if crop:
        near = int(draws.choice(augment.crop_sizes))
        larger = fitted(size, near, None, augment.multiple_of)
        box = _draw_crop(augment.crop_range, larger, draws)
        steps += [Resize(size, larger), Crop(box)]
        size = (box[2] - box[0], box[3] - box[1])
    near = int(draws.choice(augment.sizes))
    return (*steps, Resize(size, fitted(size, near, augment.max_size, augment.multiple_of)))


def _draw_crop(between: tuple[int, int], size: Size, draws: np.random.Generator) -> CropBox:
    """A box with sides in a range, or as long as the image's where these are shorter."""
    low, high = between
    width, height = (int(draws.integers(min(low, side), min(high, side) + 1)) for side in size)
    left, top = (int(draws.integers(0, side - part + 1)) for side, part in zip(size, (width, height), strict=True))
    return left, top, left + width, top + height


@dataclass(frozen=True, eq=False)
class View:
    """An image as all networks are shown it, and its objects."""

    pixels: Tensor
    """uint8 ``[3, H, W]``."""
    boxes: Tensor
    """float32 ``[n, 4]``: centre, width and height, relative to H and W."""
    classes: Tensor
    """int64 ``[n]``."""
    size: Size
    """(width, height) of the stored image in pixels."""
    removed: int
    """Boxes of the stored image that were none."""


class TrainTransform:
    """Bytes, objects and sample key to a view."""

    def __init__(self, augment: BoxAugment) -> None:
        self.augment = augment

    def __call__(self, data: bytes, objects: Objects, key: int) -> View:
        """Raises :class:`UnreadableImage` for bytes that are no image, or not the image that was annotated."""
        image = decode_annotated(data, objects)
        return take_view(image, objects, draw_steps(self.augment, image.size, key))


class EvalTransform:
    """Bytes and objects to a view of a fixed size."""

    def __init__(self, augment: BoxAugment) -> None:
        self.augment = augment

    def __call__(self, data: bytes, objects: Objects, key: int = 0) -> View:
        """`key` has no effect. Raises as :class:`TrainTransform` does."""
        image = decode_annotated(data, objects)
        sizes = self.augment.eval_size, self.augment.max_size, self.augment.multiple_of
        return take_view(image, objects, (Resize(image.size, fitted(image.size, *sizes)),))


def decode_annotated(data: bytes, objects: Objects) -> Image.Image:
    """The RGB image that objects are of; raises :class:`UnreadableImage` when it has another size."""
    image = decode(data)
    if objects.size is not None and image.size != objects.size:
        (width, height), (noted_width, noted_height) = image.size, objects.size
        raise UnreadableImage(f"{width}×{height} pixels, {noted_width}×{noted_height} in the annotations")
    return image


def take_view(image: Image.Image, objects: Objects, steps: Sequence[Step]) -> View:
    """Change an image and its objects; those that training cannot learn from are left out."""
    size = image.size
    objects, removed = trainable(objects, size)
    for step in steps:
        image = step.image(image)
        objects = replace(objects, boxes=step.boxes(objects.boxes))
    objects = objects.only(visible(objects.boxes))
    return View(as_tensor(image), relative(objects.boxes, image.size), torch.from_numpy(objects.classes), size, removed)


def relative(boxes: np.ndarray, size: Size) -> Tensor:
    """Corners in pixels ``[n, 4]`` as float32 centre, width and height in parts of the image."""
    starts, ends = boxes[:, :2] / size, boxes[:, 2:] / size
    return torch.from_numpy(np.concatenate([(starts + ends) / 2, ends - starts], 1).astype(np.float32))
