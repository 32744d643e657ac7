"""What a recipe says about images with boxes, beside its `data` block. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kd_hf.config import Block, DataConfig
from kd_hf.errors import UserError

SIDES = tuple(range(480, 801, 16))


class BoxAugment(Block):
    """Sizes of images with boxes, and random changes to them; the defaults are those of DETR and ViDT.

    A training image is flipped, then either resized or resized, cropped and resized. Every draw is keyed by (seed,
    epoch, sample); all networks are shown the same pixels.
    """

    hflip: float = Field(0.5, ge=0, le=1)
    crop: float = Field(0.5, ge=0, le=1)
    """Probability that an image is cropped before it is resized."""
    sizes: tuple[int, ...] = Field(SIDES, min_length=1)
    """Pixels of the shortest side in training; one of them is drawn."""
    max_size: int = Field(1333, gt=0)
    """The longest side at most, in training and evaluation; the shortest gives way."""
    crop_sizes: tuple[int, ...] = Field((400, 500, 600), min_length=1)
    """Pixels of the shortest side before a crop; the longest is free."""
    crop_range: tuple[int, int] = (384, 600)
    """Least and greatest side of a crop; both are drawn."""
    multiple_of: int = Field(16, gt=0)
    """Sides are rounded down to multiples of this, whereby images are distorted a little; 1 keeps them."""
    eval_size: int = Field(800, gt=0)
    """Pixels of the shortest side in evaluation."""

    @model_validator(mode="after")
    def _possible(self) -> BoxAugment:
        low, high = self.crop_range
        if not 0 < low <= high:
            raise ValueError("`crop_range` is the least and the greatest side of a crop, in this order")
        if min(*self.sizes, *self.crop_sizes, self.max_size, self.eval_size) < self.multiple_of:
            raise ValueError(f"no side may be below `multiple_of` = {self.multiple_of}")
        return self


class BoxData(Block):
    """Where boxes are found, and which images are used."""

    augment: BoxAugment = BoxAugment()
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """What the four numbers of a box are in Parquet files and tables: COCO's left, top, width and height, or left, top,
    right and bottom. COCO's own JSON files always have the first."""
    annotations: dict[str, str] | None = None
    """Split → COCO's JSON file, relative to `data.path`; by default `annotations/instances_<split>.json`."""
    images: dict[str, str] | None = None
    """Split → folder of its images, relative to `data.path`; by default the split's name, such as `train2017`."""
    empty: Literal["keep", "drop"] = "keep"
    """Whether training images without objects are used."""


def check_data(cfg: DataConfig) -> None:
    """Raise :class:`UserError` for what a `data` block may say of images with labels, but not of images with boxes."""
    asked: dict[str, tuple[Block, str]] = {name: (cfg, name) for name in ("image_size", "num_labels", "unlabelled")}
    asked |= {f"augment.{name}": (cfg.augment, name) for name in type(cfg.augment).model_fields if name != "repeats"}
    for place, (block, name) in asked.items():
        if getattr(block, name) != type(block).model_fields[name].default:
            raise UserError(f"data.{place}: not for images with boxes; see `data.boxes` for what is")
